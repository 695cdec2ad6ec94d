"""Measures several denoiser runs alike: which of them, at which steps and guidance, comes nearest to real clips.

For choosing, where :mod:`training.evaluate` is for reporting: one line a setting, no intervals, no pictures. Every
setting has the same labels and seeds, and is compared with the same real windows.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from medsora.checkpoint import LoadedCheckpoint
from medsora.config import SHORTCUT
from medsora.manifest import FORMAT_VERSION, Limits, Manifest
from medsora.models.autoencoder import VideoAutoencoder
from medsora.models.denoiser import Denoiser
from medsora.pipeline import DTYPES, VideoPipeline
from training.config import DataConfig
from training.data.clips import ClipSet
from training.errors import TrainingError
from training.evaluation.config import EvaluationConfig
from training.evaluation.frechet import distance
from training.evaluation.memorisation import TrainingIndex
from training.evaluation.networks import DistanceMetric, EvaluationNetworks
from training.evaluation.sets import ClipGroup, collect_sets
from training.export import describe_labels, shortcut_limits
from training.metrics import motion_statistics
from training.runs import RunResult, load_autoencoder, load_result, load_split

__all__ = ["Compared", "compare_runs", "comparison_table"]

Report = Callable[[str], None]
MOST_STEPS, MOST_GUIDANCE = 1000, 100.0


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Figures of one run at one setting. Distances are by the name of the metric, as in a report of ``evaluate``."""

    run: str
    average: str
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    to_test: dict[str, float]
    """From samples to the test windows."""
    to_test_same_labels: dict[str, float]
    """The same of the labels alone that the test windows have."""
    to_train: dict[str, float]
    """From samples to as many training windows of each label."""
    motion: float
    """Mean absolute change from frame to frame, grey levels."""
    resemblance: float
    """Median, over samples, of the resemblance to the nearest training window: 1 is a copy."""


def compare_runs(
    runs: Sequence[Path],
    *,
    table: Path,
    autoencoder: Path,
    autoencoder_average: str | None = None,
    averages: Sequence[str | None] = (None,),
    num_inference_steps: Sequence[int] = (50,),
    guidance_scales: Sequence[float] = (1.5,),
    sampler: str | None = None,
    networks: EvaluationNetworks,
    device: torch.device,
    settings: EvaluationConfig | None = None,
    report: Report = print,
) -> tuple[list[Compared], dict[str, float]]:
    """Sample from every run at every setting, and measure.

    Args:
        runs: Folders of denoiser runs on latents of the same autoencoder and on the same data.
        averages: Of the weights of each run; None is a run's first.
        sampler: Default the first that can use a run's network. ``shortcut`` has its guidance built in: then
            ``guidance_scales`` do not count.
        settings: How many samples; steps, guidance and sampler in it are not used.

    Returns:
        A line for every setting; and the floor: distances of training to test windows, ``NAME`` and, for the labels
        alone that the test windows have, ``NAME_same_labels``.

    Raises:
        TrainingError: A run is of another autoencoder or of other data.
    """
    settings = settings or EvaluationConfig(dtype="bfloat16" if device.type == "cuda" else "float32")
    coder, digest = load_autoencoder(autoencoder, average=autoencoder_average)
    splits: dict[str, ClipSet] = {}
    data: DataConfig | None = None
    index: TrainingIndex | None = None
    real: dict[str, dict[str, Tensor]] = {}
    floor: dict[str, float] = {}
    lines: list[Compared] = []
    metrics = networks.distance_metrics()
    for run, average in product(runs, averages):
        made = load_result(run, part="denoiser", average=average)
        if made.about.get("autoencoder_sha256") != digest:
            raise TrainingError(f"{run} was trained on the latents of another autoencoder than {autoencoder}")
        if data is None:
            data = made.config.data
            splits = {
                name: load_split(table, data, made.config.model, name, device=device) for name in ("train", "test")
            }
            index = TrainingIndex(splits["train"])
        elif made.config.data != data:
            raise TrainingError(f"{run} was trained on other data than {runs[0]}")
        assert index is not None  # made with the data
        pipeline = _pipeline(made, coder, splits["train"], device, settings.dtype)
        limits = pipeline.manifest.limits
        chosen = sampler or limits.samplers[0]
        if chosen not in limits.samplers:
            raise TrainingError(f"{run} can be sampled by {', '.join(limits.samplers)}, not by {chosen}")
        scales = [limits.shortcut_guidance] if chosen == SHORTCUT else guidance_scales
        for steps, scale in product(num_inference_steps, scales):
            asked = replace(settings, num_inference_steps=steps, guidance_scale=scale, sampler=chosen)
            sets, _ = collect_sets(pipeline, splits, asked, lambda _: None)
            if not real:
                real = {m.name: {key: m.extract(sets[key].clips) for key in ("train", "test")} for m in metrics}
                floor = _floor(real, sets, metrics)
            found = {metric.name: metric.extract(sets["samples"].clips) for metric in metrics}
            line = Compared(
                run=run.name,
                average=made.average,
                sampler=chosen,
                num_inference_steps=steps,
                guidance_scale=scale,
                to_test=_distances(found, real, "test", metrics),
                to_test_same_labels=_distances(
                    found, real, "test", metrics, _rows_of_test_labels(sets["samples"].labels, sets)
                ),
                to_train=_distances(found, real, "train", metrics),
                motion=float(motion_statistics(sets["samples"].clips)["motion"].mean()),
                resemblance=float(index.nearest(sets["samples"].clips).resemblance.median()),
            )
            lines.append(line)
            report(f"{asdict(line)}")
    return lines, floor


def comparison_table(lines: Sequence[Compared], floor: dict[str, float]) -> list[str]:
    """The figures as a Markdown table; the last line is the floor."""
    names = list(lines[0].to_test)
    columns = ["run", "average", "steps", "guidance"]
    for name in names:
        columns += [f"{name} to test", "same labels", "to train"]
    rows = [
        [
            line.run,
            line.average,
            f"{line.num_inference_steps} {line.sampler}",
            f"{line.guidance_scale:g}",
            *(
                f"{values[name]:,.0f}"
                for name in names
                for values in (line.to_test, line.to_test_same_labels, line.to_train)
            ),
            f"{line.motion:.2f}",
            f"{line.resemblance:.3f}",
        ]
        for line in lines
    ]
    last = ["real training windows", "", "", ""]
    for name in names:
        last += [f"{floor[name]:,.0f}", f"{floor[f'{name}_same_labels']:,.0f}", ""]
    columns += ["motion", "resemblance"]
    cells = [columns, ["---"] * len(columns), *rows, [*last, "", ""]]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _pipeline(
    made: RunResult, coder: VideoAutoencoder, train: ClipSet, device: torch.device, dtype: str
) -> VideoPipeline:
    """A run as a checkpoint that is nowhere on disk."""
    model, data = made.config.model, made.config.data
    denoiser = Denoiser(model.denoiser)
    denoiser.load_state_dict(made.weights)
    conditions = [
        {name: values[row[k]] for k, (name, values) in enumerate(model.condition_names.items())}
        for row in torch.unique(train.conditions, dim=0).tolist()
    ]
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=made.config.recipe,
        description="A run that is compared with others.",
        modality=data.modality,
        intended_use="Comparison.",
        licence="",
        created_at="",
        labels=describe_labels(conditions),
        limits=Limits(
            sizes=((data.width, data.height),),
            num_frames=(data.num_frames,),
            fps=data.target_fps,
            num_inference_steps=(1, 1, MOST_STEPS),
            guidance_scale=(1.0, 1.0, MOST_GUIDANCE),
            samplers=model.denoiser.samplers,
            **shortcut_limits(made.config),
        ),
    )
    # not compiled: that takes as long as sampling some hundred clips
    loaded = LoadedCheckpoint(model, manifest, copy.deepcopy(coder), denoiser)
    return VideoPipeline(loaded, device=device, dtype=DTYPES[dtype], backend="auto", compiled="off")


def _floor(
    real: dict[str, dict[str, Tensor]], sets: dict[str, ClipGroup], metrics: Sequence[DistanceMetric]
) -> dict[str, float]:
    rows = _rows_of_test_labels(sets["train"].labels, sets)
    found: dict[str, float] = {}
    for metric in metrics:
        train, test = (real[metric.name][name] for name in ("train", "test"))
        found[metric.name] = distance(train, test, ddof=metric.ddof)
        found[f"{metric.name}_same_labels"] = distance(train[rows.to(train.device)], test, ddof=metric.ddof)
    return found


def _distances(
    found: dict[str, Tensor],
    real: dict[str, dict[str, Tensor]],
    name: str,
    metrics: Sequence[DistanceMetric],
    rows: Tensor | None = None,
) -> dict[str, float]:
    return {
        metric.name: distance(
            found[metric.name] if rows is None else found[metric.name][rows.to(found[metric.name].device)],
            real[metric.name][name],
            ddof=metric.ddof,
        )
        for metric in metrics
    }


def _rows_of_test_labels(labels: Tensor, sets: dict[str, ClipGroup]) -> Tensor:
    """Which clips have a label that the test windows have."""
    return torch.isin(labels, torch.unique(sets["test"].labels)).nonzero()[:, 0]
