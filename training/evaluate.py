"""Measures a checkpoint on real clips and writes a report: ``report.json`` and contact sheets.

Reconstruction on the test split; samples against the test split in SqueezeNet features, beside the same
distance between train and test splits (the floor: no sampler that learns the training set can be asked to come
below it); motion and flicker of samples beside real clips; and how near samples come to training clips.

``frechet_squeezenet`` is the Frechet distance between Gaussians fitted to 512-number features of single frames
(last Fire module, averaged over the image). ``frechet_squeezenet_motion`` is the same for the absolute change
of those features from one frame to the next, so that it also sees time. All frames of all windows count. Neither
is comparable with FID or FVD, nor with itself at another number of windows.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from medsora.models.autoencoder import VideoAutoencoder
from medsora.pipeline import VideoPipeline
from medsora.request import resolve_request
from medsora.video_io import from_uint8, to_uint8, write_contact_sheet
from training.config import DataConfig
from training.data.clips import ClipSet, index_batches
from training.metrics import (
    frechet_distance,
    gaussian_statistics,
    motion_statistics,
    nearest_training_windows,
)
from training.runs import load_split
from training.squeezenet import SqueezeNet
from training.tasks import reconstruct

__all__ = ["EvaluationConfig", "allocate_labels", "evaluate_checkpoint", "feature_statistics"]

Report = Callable[[str], None]
FEATURE_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How much is sampled and shown."""

    num_samples: int = 512
    """Labels in proportion to the training windows, so that the whole is comparable with the whole split."""
    batch_size: int = 64
    seed: int = 1_000_000
    """Of the first sample; each has the next one."""
    sheet_clips: int = 3
    """Clips a label on the contact sheet of samples, drawn beside the samples above."""
    sheet_columns: int = 8
    dtype: str = "float32"
    """Of the sampler; what a CPU uses."""


def allocate_labels(counts: Sequence[int], total: int) -> list[int]:
    """Split ``total`` in proportion to ``counts``, exactly (largest remainders); at least 1 each if it fits.

    >>> allocate_labels([70, 29, 1], 10)
    [6, 3, 1]
    """
    whole = sum(counts)
    shares = [total * count / whole for count in counts]
    given = [int(share) for share in shares]
    order = sorted(range(len(counts)), key=lambda index: given[index] - shares[index])
    for index in order[: total - sum(given)]:
        given[index] += 1
    if total >= len(counts):
        for index, count in enumerate(given):
            if count == 0:
                given[given.index(max(given))] -= 1
                given[index] = 1
    return given


def evaluate_checkpoint(
    checkpoint: Path,
    directory: Path,
    *,
    table: Path,
    data: DataConfig,
    squeezenet: SqueezeNet,
    device: torch.device,
    settings: EvaluationConfig | None = None,
    report: Report = print,
) -> dict[str, Any]:
    """Measure a checkpoint and write ``report.json``, ``samples.png``, ``reconstruction.png`` and ``nearest.png``.

    Args:
        directory: Gets the report; made when missing.
        data: Which clips, and how windows are cut from them; that of the training recipe.

    Returns:
        What ``report.json`` holds.
    """
    settings = settings or EvaluationConfig()
    directory.mkdir(parents=True, exist_ok=True)
    pipeline = VideoPipeline.from_checkpoint(checkpoint, device=str(device), dtype=settings.dtype)
    config = pipeline.config
    splits = {name: load_split(table, data, config, name, device=device) for name in ("train", "test")}

    report("reconstructing the test split")
    figures: dict[str, Any] = {"reconstruction": asdict(reconstruct(pipeline.autoencoder, splits["test"]))}
    _reconstruction_sheet(directory / "reconstruction.png", pipeline.autoencoder, splits["test"], settings)

    labels = list(pipeline.manifest.labels)
    label_conditions = [config.condition_indices(label.condition) for label in labels]
    windows_of = [int((splits["train"].conditions == _row(c, device)).all(1).sum()) for c in label_conditions]
    counts = allocate_labels(windows_of, settings.num_samples)
    asked = [index for index, count in enumerate(counts) for _ in range(count)]
    report(f"sampling {len(asked)} clips: " + ", ".join(f"{labels[i].name} {n}" for i, n in enumerate(counts)))
    samples = _sample(pipeline, [labels[index].name for index in asked], settings, report)
    member = torch.tensor(asked)

    report("comparing")
    # of the training split as many windows as of samples, evenly spread: the distance depends on the number
    train_windows = _evenly(splits["train"], settings.num_samples)
    test_windows = _evenly(splits["test"], len(splits["test"]))
    figures["frechet"] = _frechet(squeezenet, samples, member, train_windows, test_windows, label_conditions, splits)
    figures["motion"] = _motion(samples, member, splits, [label.name for label in labels], label_conditions)
    figures["nearest_training"] = _nearest(directory / "nearest.png", samples, splits, test_windows, settings)
    figures["samples"] = {
        "per_label": {label.name: count for label, count in zip(labels, counts, strict=True)},
        "num_inference_steps": pipeline.manifest.limits.num_inference_steps[1],
        "guidance_scale": pipeline.manifest.limits.guidance_scale[1],
        "sampler": pipeline.manifest.limits.samplers[0],
        "first_seed": settings.seed,
        "dtype": settings.dtype,
    }
    names = [label.name for label in labels for _ in range(settings.sheet_clips)]
    shown = _sample(pipeline, names, settings, report)
    write_contact_sheet(
        directory / "samples.png", list(shown.cpu().numpy()), columns=settings.sheet_columns, labels=names
    )
    (directory / "report.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def _row(condition: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(condition, device=device)


def _sample(
    pipeline: VideoPipeline, names: Sequence[str], settings: EvaluationConfig, report: Report
) -> Tensor:  # (n f h w 3) uint8 on the pipeline's device
    requests = [
        resolve_request(pipeline.manifest, label=name, seed=settings.seed + index) for index, name in enumerate(names)
    ]
    clips: list[np.ndarray] = []
    for start in range(0, len(requests), settings.batch_size):
        clips += pipeline(requests[start : start + settings.batch_size])
        report(f"  {len(clips)} of {len(requests)} clips")
    return torch.from_numpy(np.stack(clips)).to(pipeline.device)


def _evenly(clips: ClipSet, count: int) -> Tensor:
    """``count`` window indices spread evenly over all windows (all of them when there are no more)."""
    count = min(count, len(clips))
    return torch.linspace(0, len(clips) - 1, count, device=clips.frames.device).round().long()


def _cut(clips: ClipSet, indices: Tensor) -> Tensor:
    return clips.gather(indices, torch.zeros_like(indices, dtype=torch.bool))


@torch.no_grad()
def _features(squeezenet: SqueezeNet, clips: Tensor) -> Tensor:
    """(n f h w 3) uint8 -> (n f 512) float32."""
    parts = []
    for rows in index_batches(len(clips), max(1, FEATURE_BATCH // clips.shape[1]), clips.device):
        batch = clips[rows]
        frames = rearrange(from_uint8(batch), "n c f h w -> (n f) c h w")
        parts.append(rearrange(squeezenet.pooled(frames), "(n f) d -> n f d", n=len(batch)))
    return torch.cat(parts)


def feature_statistics(features: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Gaussians of single frames and of changes between frames.

    Args:
        features: (n, f, d) of n clips.
    """
    return {
        "frechet_squeezenet": gaussian_statistics(rearrange(features, "n f d -> (n f) d")),
        "frechet_squeezenet_motion": gaussian_statistics(rearrange(features.diff(dim=1).abs(), "n f d -> (n f) d")),
    }


def _frechet(
    squeezenet: SqueezeNet,
    samples: Tensor,
    member: Tensor,
    train_windows: Tensor,
    test_windows: Tensor,
    label_conditions: Sequence[tuple[int, ...]],
    splits: dict[str, ClipSet],
) -> dict[str, Any]:
    """Distances between samples, train and test; also with the labels that the test split has, alone."""
    ours = _features(squeezenet, samples)
    train = _features(squeezenet, _cut(splits["train"], train_windows))
    test = _features(squeezenet, _cut(splits["test"], test_windows))

    def compare(sampled: Tensor, trained: Tensor) -> dict[str, Any]:
        result: dict[str, Any] = {"samples": len(sampled), "train_windows": len(trained), "test_windows": len(test)}
        statistics = [feature_statistics(features) for features in (sampled, trained, test)]
        for name in statistics[0]:
            a, b, c = (item[name] for item in statistics)
            result[name] = {
                "samples_to_test": frechet_distance(a, c),
                "train_to_test": frechet_distance(b, c),
                "samples_to_train": frechet_distance(a, b),
            }
        return result

    in_test = {tuple(row) for row in torch.unique(splits["test"].conditions, dim=0).tolist()}
    kept = [index for index, condition in enumerate(label_conditions) if condition in in_test]
    chosen = torch.isin(member, torch.tensor(kept))
    trained_rows = [tuple(row) in in_test for row in splits["train"].conditions[train_windows].tolist()]
    result = {"all_labels": compare(ours, train)}
    if min(int(chosen.sum()), sum(trained_rows)) >= 2:
        result["labels_of_the_test_split"] = compare(ours[chosen.to(ours.device)], train[torch.tensor(trained_rows)])
    return result


def _motion(
    samples: Tensor,
    member: Tensor,
    splits: dict[str, ClipSet],
    names: Sequence[str],
    label_conditions: Sequence[tuple[int, ...]],
) -> dict[str, Any]:
    """Mean motion and flicker of samples beside training windows, by label, and of the test split."""

    def summary(clips: Tensor) -> dict[str, float]:
        return {name: round(float(values.mean()), 4) for name, values in motion_statistics(clips).items()}

    result: dict[str, Any] = {"test_split": summary(_cut(splits["test"], _evenly(splits["test"], 256)))}
    for index, (name, condition) in enumerate(zip(names, label_conditions, strict=True)):
        rows = (splits["train"].conditions == _row(condition, samples.device)).all(1).nonzero()[:, 0]
        spread = rows[torch.linspace(0, len(rows) - 1, min(len(rows), 128), device=rows.device).long()]
        entry: dict[str, Any] = {"train": summary(_cut(splits["train"], spread))}
        if bool((member == index).any()):
            entry["samples"] = summary(samples[(member == index).to(samples.device)])
        result[name] = entry
    return result


def _nearest(
    path: Path, samples: Tensor, splits: dict[str, ClipSet], test_windows: Tensor, settings: EvaluationConfig
) -> dict[str, Any]:
    """How near samples come to training windows, beside how near the test split comes to them."""
    distance, window, mirrored = nearest_training_windows(samples, splits["train"])
    real, _, _ = nearest_training_windows(_cut(splits["test"], test_windows), splits["train"])
    closest = distance.argsort()[:6]
    rows: list[np.ndarray] = []
    labels: list[str] = []
    for index in closest.tolist():
        source = splits["train"]
        twin = source.gather(window[index : index + 1], mirrored[index : index + 1])[0]
        record = source.records[int(source.clips[window[index]])]
        rows += [samples[index].cpu().numpy(), twin.cpu().numpy()]
        labels += [f"sample {index}", f"nearest: {Path(record.file).stem}, rms {float(distance[index]):.1f}"]
    write_contact_sheet(path, rows, columns=settings.sheet_columns, labels=labels)

    def summary(values: Tensor) -> dict[str, float]:
        return {
            "least": round(float(values.min()), 3),
            "median": round(float(values.median()), 3),
            "mean": round(float(values.mean()), 3),
        }

    return {
        "unit": "root-mean-square grey levels (0 to 255) at 32x32 pixels, all frames",
        "samples": summary(distance),
        "test_split": summary(real),
    }


@torch.no_grad()
def _reconstruction_sheet(
    path: Path, autoencoder: VideoAutoencoder, clips: ClipSet, settings: EvaluationConfig
) -> None:
    """Original and reconstruction of some test windows, one below the other."""
    originals = _cut(clips, _evenly(clips, 4))
    rows: list[np.ndarray] = []
    names: list[str] = []
    for original in originals:
        video = from_uint8(original[None])
        decoded = autoencoder.decode(autoencoder.encode(video.to(autoencoder.latent_mean.dtype)))
        rows += [original.cpu().numpy(), to_uint8(decoded)[0].cpu().numpy()]
        names += ["test clip", "reconstruction"]
    write_contact_sheet(path, rows, columns=settings.sheet_columns, labels=names)
