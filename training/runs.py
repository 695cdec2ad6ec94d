"""Puts a run together from its configuration, and keeps what it made: the averaged weights and how they came.

A run's folder holds ``checkpoints/`` (to resume), ``log.jsonl``, ``tensorboard/``, and after every leg that no signal
cut short ``result/``: ``weights.safetensors`` (float16, the precision that is shipped), a file like it for every other
average, and ``result.json``.
"""

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medsora.checkpoint import load_checkpoint
from medsora.config import ModelConfig
from medsora.files import sha256_of
from medsora.jsonconfig import from_json, to_json
from medsora.models.autoencoder import VideoAutoencoder
from medsora.models.denoiser import Denoiser
from training.alignment import AlignmentFiles, make_alignment
from training.config import DataConfig, TrainConfig, config_hash
from training.data.cached_latents import cached_latents
from training.data.clips import ClipSet, load_clips, sampling_weights
from training.data.latents import LatentSet, latent_statistics, load_or_encode
from training.data.manifest import read_clip_table, select_clips
from training.data.prepared import load_prepared
from training.data.tensor_file import keep_tensors, kept_tensors
from training.distillation_task import DistillationTask
from training.distributed import Processes
from training.errors import TrainingError
from training.perceptual import FrameDistance
from training.prepare.cache import is_cache, open_cache
from training.tasks import AutoencoderTask, DenoiserTask
from training.trainer import TrainResult, step_seed, train
from training.trajectories import Trajectories, record_trajectories

__all__ = [
    "RunResult",
    "load_autoencoder",
    "load_denoiser_weights",
    "load_result",
    "load_split",
    "train_autoencoder",
    "train_denoiser",
]

RESULT = "result"
ENCODE_BATCH = 64
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class RunResult:
    """What a run made."""

    config: TrainConfig
    weights: dict[str, Tensor]
    """Averaged weights, float16 where they are floats."""
    average: str
    """Which average they are: ``ema-`` and its half-life in steps, or ``best``: the first one of those, of the best
    checkpoint."""
    about: dict[str, Any]
    """Steps, seconds, device, versions, metrics, clips that windows were cut from. Hash and metrics are those
    of the average."""


def load_split(
    table: Path, data: DataConfig, model: ModelConfig, split: str, *, device: torch.device, step: int | None = None
) -> ClipSet:
    """Decode one split of the data set that a recipe names.

    Args:
        table: ``clips.csv``, with the clips beside it; or the folder of a prepared cache.
        step: Distance between window starts; default the recipe's for that split.
    """
    if is_cache(table):
        return load_prepared(open_cache(table), data, model, split, device=device, step=step)
    records = select_clips(
        read_clip_table(table), dataset=data.dataset, split=split, excluded_labels=data.excluded_labels
    )
    return load_clips(
        records,
        root=table.parent,
        num_frames=data.num_frames,
        height=data.height,
        width=data.width,
        target_fps=data.target_fps,
        condition_columns=tuple(data.condition_columns.values()),
        condition_names=tuple(model.condition_names.values()),
        step=data.step_of(split) if step is None else step,
        device=device,
    )


def train_autoencoder(
    config: TrainConfig,
    directory: Path,
    *,
    table: Path,
    perceptual: FrameDistance | None = None,
    device: torch.device,
    processes: Processes | None = None,
    initial: dict[str, Tensor] | None = None,
    is_resuming: bool = False,
    time_budget_s: float | None = None,
    started: float | None = None,
    report: Report = print,
) -> TrainResult:
    """Train an autoencoder, store its latent statistics in it, write ``result/``.

    Args:
        perceptual: What the perceptual term measures with; needed unless its weight is 0.
        processes: Those that train together; default this one alone.
        initial: Weights to start from instead of random ones.
        time_budget_s, started: As in :func:`training.trainer.train`.
    """
    _require_part(config, "autoencoder")
    splits = {name: load_split(table, config.data, config.model, name, device=device) for name in ("train", "test")}
    _report_splits(splits, config, report)
    torch.manual_seed(step_seed(config.loop.seed, -1))
    model = VideoAutoencoder(config.model.require_autoencoder()).to(device)
    _start_from(model, initial)
    task = AutoencoderTask(config, model, splits["train"], splits["test"], perceptual)
    result = train(
        task, config, directory, device=device, processes=processes, is_resuming=is_resuming,
        time_budget_s=time_budget_s, started=started, report=report,
    )  # fmt: skip
    average = cast(VideoAutoencoder, result.average)
    for state in reversed(result.averages.values()):  # so that the network is left with the first
        average.load_state_dict(state)
        mean, scale = latent_statistics(average, splits["train"], batch_size=ENCODE_BATCH)
        average.latent_mean.copy_(mean)
        average.latent_scale.copy_(scale)
        state |= {"latent_mean": mean, "latent_scale": scale}
    _save_result(directory, config, result, splits["train"], device)
    return result


def train_denoiser(
    config: TrainConfig,
    directory: Path,
    *,
    table: Path,
    autoencoder: Path,
    autoencoder_average: str | None = None,
    teacher: Path | None = None,
    teacher_average: str | None = None,
    alignment_files: AlignmentFiles | None = None,
    device: torch.device,
    processes: Processes | None = None,
    initial: dict[str, Tensor] | None = None,
    is_resuming: bool = False,
    time_budget_s: float | None = None,
    started: float | None = None,
    report: Report = print,
) -> TrainResult:
    """Encode the clips, train a denoiser on the latents, write ``result/``.

    Args:
        autoencoder: Folder of a finished autoencoder run, or a checkpoint directory.
        autoencoder_average: Which of the run's averages; default the first.
        teacher: Folder of the run that a distillation learns from, and starts from; needed by that alone.
        teacher_average: Which of its averages; default the first.
        alignment_files: Frozen networks, as ``alignment.kind`` needs them.
    """
    _require_part(config, "denoiser")
    if (config.distillation is None) != (teacher is None):
        has, wants = ("a teacher", "none") if teacher is not None else ("no teacher", "one")
        raise TrainingError(f"{config.recipe} is given {has}, and has use for {wants}")
    processes = processes or Processes(device)
    coder, digest = load_autoencoder(autoencoder, average=autoencoder_average)
    if coder.config != config.model.autoencoder:
        raise TrainingError(
            f"the autoencoder in {autoencoder} has another shape than the recipe's: {coder.config} "
            f"against {config.model.autoencoder}"
        )
    coder = coder.to(device).eval().requires_grad_(False)
    latents: dict[str, LatentSet] = {}
    splits: dict[str, ClipSet] = {}
    for name in ("train", "test"):
        splits[name] = load_split(table, config.data, config.model, name, device=device)
        key = config_hash({
            "autoencoder": digest, "data": to_json(config.data), "split": name,
            "clips": [to_json(record) for record in splits[name].records],
        })  # fmt: skip
        has_flips = config.data.has_flips and name == "train"
        stored = None
        if is_cache(table):
            stored = cached_latents(
                open_cache(table), splits[name], autoencoder_sha256=digest, data=config.data, has_flips=has_flips
            )
        with processes.first_goes_ahead():
            latents[name] = stored or load_or_encode(
                directory / f"latents-{name}.safetensors",
                key=key,
                autoencoder=coder,
                clips=splits[name],
                has_flips=has_flips,
                batch_size=ENCODE_BATCH,
            )
    _report_splits(splits, config, report)
    shape = tuple(latents["train"].latents.shape[1:])
    report(f"latents: {len(latents['train'])} train, {len(latents['test'])} test, {shape}")
    torch.manual_seed(step_seed(config.loop.seed, -1))
    model = Denoiser(config.model.denoiser).to(device)
    if teacher is not None:
        learned = _load_teacher(teacher, teacher_average, config, autoencoder_sha256=digest)
        initial = model.state_dict() | (initial or learned.weights)
    _start_from(model, initial)
    with processes.first_goes_ahead():
        alignment = make_alignment(
            config,
            model,
            splits["train"],
            files=alignment_files or AlignmentFiles(),
            cache=directory / "flow-features.safetensors",
            device=device,
            prepared=open_cache(table) if is_cache(table) else None,
        )
    if alignment is not None:
        pairs, shape = len(alignment.targets.features), tuple(alignment.targets.features.shape[1:])
        report(f"alignment: features {shape} of {pairs} pairs of frames")
    data = (latents["train"], latents["test"])
    task: DenoiserTask
    extra = {"autoencoder_sha256": digest}
    if teacher is None:
        task = DenoiserTask(config, model, *data, clips=splits["train"], autoencoder=coder, alignment=alignment)
    else:
        with processes.first_goes_ahead():
            trajectories = _trajectories(config, learned, latents["train"], directory, device, report)
        extra["teacher_sha256"] = learned.about["sha256"]
        task = DistillationTask(
            config, model, *data, trajectories=trajectories, clips=splits["train"], autoencoder=coder
        )
    result = train(
        task, config, directory, device=device, processes=processes, is_resuming=is_resuming,
        time_budget_s=time_budget_s, started=started, report=report,
    )  # fmt: skip
    _save_result(directory, config, result, splits["train"], device, extra)
    return result


def _load_teacher(path: Path, average: str | None, config: TrainConfig, *, autoencoder_sha256: str) -> RunResult:
    """The run that a distillation learns from."""
    made = load_result(path, part="denoiser", average=average)
    if made.about.get("autoencoder_sha256") != autoencoder_sha256:
        raise TrainingError(f"the teacher in {path} was trained on the latents of another autoencoder")
    wanted = replace(config.model.denoiser, has_step_sizes=False)
    if made.config.model.denoiser != wanted:
        raise TrainingError(
            f"the teacher in {path} has another shape than the recipe's: {made.config.model.denoiser} against {wanted}"
        )
    return made


def _trajectories(
    config: TrainConfig,
    teacher: RunResult,
    data: LatentSet,
    directory: Path,
    device: torch.device,
    report: Report,
) -> Trajectories:
    """The teacher's trajectories, from the run's folder or sampled now and kept there."""
    settings = config.distillation
    assert settings is not None  # the caller has a teacher
    path = directory / "trajectories.safetensors"
    key = config_hash({
        "teacher": teacher.about["sha256"], "autoencoder": teacher.about["autoencoder_sha256"],
        "seed": config.loop.seed, "distillation": to_json(settings), "data": to_json(config.data),
        "precision": config.loop.precision, "clean_prefixes": config.denoiser_loss.clean_prefixes,
        "clips": teacher.about["clips"],
    })  # fmt: skip
    kept = kept_tensors(path, key=key, device=device)
    if kept is not None:
        return Trajectories(states=kept["states"], conditions=kept["conditions"], is_known=kept["is_known"])
    network = Denoiser(teacher.config.model.denoiser)
    _start_from(network, teacher.weights)
    network = network.to(device).eval().requires_grad_(False)
    if config.loop.compile:
        network.make_tables((data.latents.shape[2], data.latents.shape[3], data.latents.shape[4]), device)
        network.compile_parts()
    made = record_trajectories(
        network,
        data,
        sampling_weights(data.conditions, config.data.sampling_exponent),
        settings,
        clean_prefixes=config.denoiser_loss.clean_prefixes,
        generator=torch.Generator(device).manual_seed(step_seed(config.loop.seed, -2)),
        precision=torch.bfloat16 if config.loop.precision == "bf16" else None,
        report=report,
    )
    keep_tensors(path, {"states": made.states, "conditions": made.conditions, "is_known": made.is_known}, key=key)
    return made


def load_autoencoder(path: Path, *, average: str | None = None) -> tuple[VideoAutoencoder, str]:
    """The autoencoder of a run folder or of a checkpoint directory, and the hash of its weight file.

    Args:
        average: Which of a run's averages; default the first. A checkpoint has but one.
    """
    if (path / RESULT).is_dir():
        made = load_result(path, part="autoencoder", average=average)
        coder = VideoAutoencoder(made.config.model.require_autoencoder())
        coder.load_state_dict(made.weights)
        return coder.eval(), made.about["sha256"]
    if (path / "manifest.json").is_file():
        if average is not None:
            raise TrainingError(f"{path} is a checkpoint, which holds no averages to choose {average} from")
        loaded = load_checkpoint(path).autoencoder
        if loaded is None:
            raise TrainingError(f"{path} is a checkpoint without an autoencoder")
        return loaded, sha256_of(path / "autoencoder.safetensors")
    raise TrainingError(f"{path} is neither the folder of an autoencoder run (no {RESULT}/) nor a checkpoint")


def load_denoiser_weights(path: Path) -> dict[str, Tensor]:
    """Denoiser weights of a run folder or of a checkpoint directory, e.g. to start another run from."""
    if (path / RESULT).is_dir():
        return load_result(path, part="denoiser").weights
    return load_checkpoint(path).denoiser.state_dict()


def load_result(directory: Path, *, part: str, average: str | None = None) -> RunResult:
    """What the run in ``directory`` made.

    Args:
        average: Which average of the weights, as :class:`RunResult` names them; default the run's first.

    Raises:
        TrainingError: No result there, a damaged one, one of the other part, or one without that average.
    """
    folder = directory / RESULT
    try:
        about = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        config = from_json(TrainConfig, about.pop("config"), where=f"{folder}/result.json")
        averages = about["averages"]
        name = next(iter(averages)) if average is None else average
        if name not in averages:
            raise TrainingError(f"{directory} has no average {name!r}; it has {', '.join(averages)}")
        path = folder / averages[name]["file"]
        digest = sha256_of(path)
        weights = load_file(path)
        wanted, metrics = averages[name]["sha256"], averages[name]["metrics"]
    except (OSError, ValueError, KeyError, TypeError, StopIteration, SafetensorError) as error:
        raise TrainingError(f"{directory} holds no usable result: {error}") from error
    if digest != wanted:
        raise TrainingError(f"{path} does not have the hash that result.json says")
    if config.part != part:
        raise TrainingError(f"{directory} holds a run of part {config.part}, not {part}")
    about |= {"sha256": digest, "metrics": metrics}
    return RunResult(config=config, weights=weights, average=name, about=about)


def _save_result(
    directory: Path,
    config: TrainConfig,
    result: TrainResult,
    train_clips: ClipSet,
    device: torch.device,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write the averages. Not after a signal: whoever sent it waits, and the checkpoint holds all there is."""
    if not result.averages or result.signal_number:
        return
    folder = directory / RESULT
    folder.mkdir(parents=True, exist_ok=True)
    averages: dict[str, dict[str, Any]] = {}
    for name, state in result.averages.items():
        file = f"{name}.safetensors" if averages else "weights.safetensors"
        save_file(_to_half(state), folder / f"{file}.tmp")
        averages[name] = {
            "file": file, "sha256": sha256_of(folder / f"{file}.tmp"), "metrics": result.metrics.get(name, {})
        }  # fmt: skip
    about = {
        "config": to_json(config),
        "averages": averages,
        "step": result.step,
        "seconds": round(result.seconds, 1),
        "is_finished": result.is_finished,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in result.average.parameters()),
        "windows": len(train_clips),
        "clips": [to_json(train_clips.records[clip]) for clip in torch.unique(train_clips.clips).tolist()],
        **(extra or {}),
    }
    (folder / "result.json.tmp").write_text(json.dumps(about, indent=1), encoding="utf-8")
    for file in (*(average["file"] for average in averages.values()), "result.json"):
        (folder / f"{file}.tmp").replace(folder / file)


def _to_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {
        name: (value.half() if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in state.items()
    }
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise TrainingError(f"weights do not fit float16: {', '.join(broken[:5])}")
    return tensors


def _start_from(model: nn.Module, initial: dict[str, Tensor] | None) -> None:
    if initial is None:
        return
    try:
        model.load_state_dict(
            {name: value.float() if value.is_floating_point() else value for name, value in initial.items()}
        )
    except RuntimeError as error:
        raise TrainingError(f"the weights to start from do not fit the recipe: {error}") from error


def _require_part(config: TrainConfig, part: str) -> None:
    if config.part != part:
        raise TrainingError(f"{config.recipe} is a recipe for the {config.part}, not for the {part}")


def _report_splits(splits: dict[str, ClipSet], config: TrainConfig, report: Report) -> None:
    names = tuple(config.model.condition_names.values())
    for name, clips in splits.items():
        found, counts = torch.unique(clips.conditions, dim=0, return_counts=True)
        by_condition = ", ".join(
            f"{' '.join(values[place] for values, place in zip(names, places, strict=True))}: {count}"
            for places, count in zip(found.tolist(), counts.tolist(), strict=True)
        )
        report(f"{name}: {len(clips.records)} clips, {len(clips.frames)} frames, {len(clips)} windows ({by_condition})")
        unused = len(clips.records) - len(torch.unique(clips.clips))
        if unused:
            report(f"{name}: {unused} of the clips are without a scene of {clips.num_frames} frames, and not used")
