"""From two finished runs to a checkpoint directory that the server can load: weights, labels, provenance.

The directory is written beside its place, loaded again and compared weight by weight before it is put there.
"""

import re
import shutil
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsora.checkpoint import load_checkpoint, save_checkpoint
from medsora.config import DenoiserConfig, ModelConfig
from medsora.geometry import CHUNK_FRAMES
from medsora.manifest import FORMAT_VERSION, Label, Limits, Manifest, normalise_label
from training.config import DataConfig, TrainConfig
from training.errors import TrainingError
from training.fingerprints import fingerprint_checkpoint
from training.runs import RunResult, load_result

__all__ = [
    "Sampling",
    "describe_labels",
    "export_checkpoint",
    "report_metrics",
    "shortcut_limits",
    "training_data_entries",
]

INTENDED_USE = (
    "Research on synthetic medical video only. Not for diagnosis, not for training of clinicians, and without "
    "any clinical validation. Every generated clip must be marked as synthetic."
)
FINDINGS = {
    "regular": ("regular lung", ("normal", "healthy", "normal lung", "healthy lung", "regular lung")),
    "covid": ("lung with signs of COVID-19", ("covid-19", "covid lung", "sars-cov-2", "covid-19 lung")),
    "viral": ("viral pneumonia other than COVID-19", ("viral pneumonia",)),
    "pneumonia": ("bacterial pneumonia", ("bacterial pneumonia", "pneumonia lung")),
}
MAX_ENTRIES = 2000
PROBES = {"convex": ("convex", "curvilinear", "curved"), "linear": ("linear", "linear array")}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Limits of the sampler that the manifest states: least, default, most."""

    num_inference_steps: tuple[int, int, int] = (1, 30, 250)
    guidance_scale: tuple[float, float, float] = (1.0, 1.5, 8.0)
    max_frames: int = 512
    """Frames of the longest clip, where the denoiser was trained with clean prefixes: windows add up without end, but
    nobody has looked at what becomes of a longer one."""
    sampler: str | None = None
    """The default one; None is the first of those that can use the network. All of those are allowed."""

    def samplers_for(self, network: DenoiserConfig) -> tuple[str, ...]:
        """The samplers that the manifest allows, the default one first.

        Raises:
            TrainingError: The sampler that was asked for cannot use this network.
        """
        able = network.samplers
        chosen = able[0] if self.sampler is None else self.sampler
        if chosen not in able:
            kind = f"predicts {network.prediction}" + (" and has step sizes" if network.has_step_sizes else "")
            raise TrainingError(f"a network that {kind} is sampled by {' or '.join(able)}, not {chosen}")
        return (chosen, *(name for name in able if name != chosen))


def describe_labels(conditions: list[dict[str, str]]) -> tuple[Label, ...]:
    """Labels for the combinations of conditions that were trained.

    The words of the lung-ultrasound data are known. There, a finding may be asked for without naming the probe: then
    the first of :data:`PROBES` it was trained with is meant. Labels of other data are called after their values.

    Raises:
        TrainingError: Two of them would have the same name.
    """
    if not all(
        set(condition) == {"finding", "probe"} and condition["finding"] in FINDINGS and condition["probe"] in PROBES
        for condition in conditions
    ):
        return _plain_labels(conditions)
    labels = []
    named: set[str] = set()
    for finding, (words, synonyms) in FINDINGS.items():
        for probe, probe_words in PROBES.items():
            if {"finding": finding, "probe": probe} not in conditions:
                continue
            plain = () if finding in named else (finding, *synonyms)
            named.add(finding)
            with_probe = tuple(f"{synonym} {word}" for synonym in (finding, *synonyms) for word in probe_words)
            labels.append(
                Label(
                    name=f"{finding}-{probe}",
                    description=f"Lung ultrasound: {words}, {probe} probe",
                    synonyms=tuple(dict.fromkeys((*plain, *with_probe))),
                    condition={"finding": finding, "probe": probe},
                )
            )
    return tuple(labels)


def _plain_labels(conditions: list[dict[str, str]]) -> tuple[Label, ...]:
    """Labels called after their values: ``{"label": "polyp", "light": "NBI"}`` is ``polyp-NBI``."""
    named: dict[str, Label] = {}
    for condition in conditions:
        name = "-".join(re.sub(r"[\W_]+", "_", value).strip("_") or "none" for value in condition.values())
        other = named.get(normalise_label(name))
        if other is not None:
            raise TrainingError(f"{condition} and {other.condition} would both be called {name!r}")
        described = ", ".join(f"{key}: {value}" for key, value in condition.items())
        named[normalise_label(name)] = Label(name=name, description=described, condition=condition)
    return tuple(named.values())


def shortcut_limits(config: TrainConfig) -> dict[str, Any]:
    """What a manifest says of the sampler ``shortcut``: nothing, where the run was no distillation."""
    settings = config.distillation
    if settings is None:
        return {}
    return {"shortcut_steps": settings.steps, "shortcut_guidance": settings.guidance_scale}


def report_metrics(report: Any) -> Any:
    """What a manifest keeps of an evaluation's ``report.json``: all but which training clips its page shows, and five
    significant digits of each number.

    >>> report_metrics({"psnr_db": 38.0344892, "shown_training_clips": []})
    {'psnr_db': 38.034}
    """
    if isinstance(report, dict):
        return {key: report_metrics(value) for key, value in report.items() if key != "shown_training_clips"}
    if isinstance(report, list):
        return [report_metrics(value) for value in report]
    return float(f"{report:.5g}") if isinstance(report, float) else report


def training_data_entries(clips: list[dict[str, Any]]) -> tuple[dict[str, str], ...]:
    """Name, label, licence, source and attribution of every training clip; of very many, one entry for all alike."""
    entries = [
        {
            "file": clip["file"],
            "label": "-".join(clip.get("labels", {}).values()) or f"{clip['label']}-{clip['probe']}",
            "licence": clip["licence"],
            "source": clip["source"],
            "attribution": clip["attribution"],
        }
        for clip in clips
    ]
    if len(entries) <= MAX_ENTRIES:
        return tuple(entries)
    counts = Counter(tuple(list(entry.values())[1:]) for entry in entries)
    names = ("label", "licence", "source", "attribution")
    return tuple({"file": f"{count} clips"} | dict(zip(names, values, strict=True)) for values, count in counts.items())


def export_checkpoint(
    directory: Path,
    *,
    autoencoder_run: Path,
    denoiser_run: Path,
    average: str | None = None,
    name: str,
    licence: str | None = None,
    metrics: dict[str, Any] | None = None,
    sampling: Sampling | None = None,
    table: Path | None = None,
) -> Manifest:
    """Write a checkpoint directory from the averaged weights of two runs.

    Args:
        directory: Must not exist, or hold a checkpoint (a folder with a ``manifest.json``), which is replaced.
        autoencoder_run: Folder of the run; or of the checkpoint whose autoencoder the denoiser was trained on. Of the
            run's averages the one is taken that the denoiser was trained on.
        average: Which of the denoiser's averages; default its first.
        licence: Of the weights; default CC BY 4.0 for the lung-ultrasound data, else those of the clips.
        metrics: Figures for the manifest, e.g. of :mod:`training.evaluate`.
        table: As for :func:`training.runs.load_split`: fingerprints of its training clips go into the checkpoint, so
            that a server can drop copies of them; None: there are none.

    Raises:
        TrainingError: The runs do not belong together, the folder is something else, or the round trip
            changed a weight.
    """
    denoiser = load_result(denoiser_run, part="denoiser", average=average)
    coder, digest, coder_summary = _autoencoder(autoencoder_run, denoiser.about.get("autoencoder_sha256"))
    if denoiser.about.get("autoencoder_sha256") != digest:
        raise TrainingError(f"the denoiser in {denoiser_run} was not trained on the autoencoder in {autoencoder_run}")
    if directory.exists() and not (directory / "manifest.json").is_file() and any(directory.iterdir()):
        raise TrainingError(f"{directory} is there and is no checkpoint: choose another folder")
    config, data = denoiser.config.model, denoiser.config.data
    training = {"autoencoder": coder_summary, "denoiser": _run_summary(denoiser)}
    manifest = _manifest(
        name,
        licence,
        config,
        data,
        denoiser.about["clips"],
        training,
        sampling or Sampling(),
        metrics or {},
        shortcut=shortcut_limits(denoiser.config),
        clean_prefixes=denoiser.config.denoiser_loss.clean_prefixes > 0 and data.num_frames >= 2 * CHUNK_FRAMES,
    )
    scratch = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        written = save_checkpoint(
            scratch, config=config, autoencoder=coder, denoiser=denoiser.weights, manifest=manifest
        )
        _verify(scratch, coder, denoiser.weights)
        if table is not None:
            written = fingerprint_checkpoint(scratch, table, data, config)
        shutil.rmtree(directory, ignore_errors=True)
        scratch.replace(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return written


def _autoencoder(path: Path, wanted: str | None) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Weights, hash of their file, and how they were trained; of a run or of an earlier checkpoint.

    Args:
        wanted: Hash by which one of a run's averages is chosen; the first where none has it.
    """
    if (path / "manifest.json").is_file():
        loaded = load_checkpoint(path)
        if loaded.autoencoder is None:
            raise TrainingError(f"{path} is a checkpoint without an autoencoder")
        weights = {key: value.half() if value.is_floating_point() else value
                   for key, value in loaded.autoencoder.state_dict().items()}  # fmt: skip
        summary = loaded.manifest.training.get("autoencoder", {})
        return weights, loaded.manifest.files["autoencoder.safetensors"].sha256, summary
    result = load_result(path, part="autoencoder")
    for name, average in result.about["averages"].items():
        if average["sha256"] == wanted:
            result = load_result(path, part="autoencoder", average=name)
    return result.weights, result.about["sha256"], _run_summary(result)


def _verify(directory: Path, autoencoder: dict[str, Tensor], denoiser: dict[str, Tensor]) -> None:
    loaded = load_checkpoint(directory)
    for module, weights in ((loaded.autoencoder, autoencoder), (loaded.denoiser, denoiser)):
        assert module is not None  # save_checkpoint was given both
        for name, value in module.state_dict().items():
            if not torch.equal(value, weights[name].to(value.dtype)):
                raise TrainingError(f"weight {name} is not the same after saving and loading")


def _manifest(
    name: str,
    licence: str | None,
    config: ModelConfig,
    data: DataConfig,
    clips: list[dict[str, Any]],
    training: dict[str, Any],
    sampling: Sampling,
    metrics: dict[str, Any],
    *,
    shortcut: dict[str, Any],
    clean_prefixes: bool,
) -> Manifest:
    conditions: list[dict[str, str]] = []
    for clip in clips:
        columns = clip.get("labels") or clip  # of a prepared cache, or of a table
        condition = {key: columns[column] for key, column in data.condition_columns.items()}
        if condition not in conditions:
            conditions.append(condition)
    is_lung = data.dataset == "lung_ultrasound"
    subject = "Lung ultrasound" if is_lung else data.dataset
    of_clips = ", ".join(sorted({clip["licence"] or "not stated" for clip in clips}))
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        description=(
            f"{subject} clips of {data.num_frames} frames, {data.width}x{data.height} pixels, "
            f"{data.target_fps:g} frames a second, by {' and '.join(data.condition_columns)}. "
            f"Trained on {len(clips)} clips."
        ),
        modality="US" if is_lung else data.modality,
        intended_use=INTENDED_USE,
        licence=licence or ("CC BY 4.0" if is_lung else f"that of the training clips: {of_clips}"),
        created_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        labels=describe_labels(conditions),
        limits=Limits(
            sizes=((data.width, data.height),),
            num_frames=(data.num_frames,),
            fps=data.target_fps,
            num_inference_steps=_steps_for(config.denoiser.prediction, sampling.num_inference_steps),
            guidance_scale=sampling.guidance_scale,
            samplers=sampling.samplers_for(config.denoiser),
            **shortcut,
            clean_prefixes=clean_prefixes,
            max_frames=max(sampling.max_frames, data.num_frames) if clean_prefixes else None,
        ),
        training_data=training_data_entries(clips),
        training=training,
        metrics=metrics,
    )


def _steps_for(prediction: str, steps: tuple[int, int, int]) -> tuple[int, int, int]:
    """A plan over the trained steps of noise prediction has two at least."""
    least = 2 if prediction == "noise" else 1
    return max(least, steps[0]), max(least, steps[1]), steps[2]


def _run_summary(result: RunResult) -> dict[str, Any]:
    loop = result.config.loop
    summary = {
        key: result.about[key] for key in ("step", "seconds", "is_finished", "device", "torch", "parameters", "windows")
    }
    return {
        "recipe": result.config.recipe,
        **summary,
        "batch_size": loop.batch_size,
        "learning_rate": result.config.optimizer.learning_rate,
        "seed": loop.seed,
        "average": result.average,
        "precision": loop.precision,
        "metrics": result.about["metrics"],
    }
