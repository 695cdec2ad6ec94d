"""The three sets that every figure compares: generated clips, real training windows, real test windows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from medsora.models.autoencoder import VideoAutoencoder
from medsora.pipeline import VideoPipeline
from medsora.request import GenerationRequest, resolve_request
from medsora.video_io import from_uint8, to_uint8
from training.data.clips import ClipSet, index_batches
from training.errors import TrainingError
from training.evaluation.bootstrap import Units, draw_weights, generated_units, units_of_windows
from training.evaluation.config import EvaluationConfig

__all__ = [
    "ClipGroup", "allocate_labels", "collect_sets", "cut_windows", "evenly", "spread", "subset_units",
    "through_autoencoder", "windows_of",
]  # fmt: skip

Report = Callable[[str], None]
Clips = UInt8[Tensor, "n f h w 3"]
RECONSTRUCTION_BATCH = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipGroup:
    """Clips of one origin, and what is resampled among them."""

    clips: Clips
    labels: Tensor
    """(n,) int64 on the CPU: index of the checkpoint's label; -1 for a condition that has none."""
    units: Units

    def weights(self, settings: EvaluationConfig, salt: int) -> Tensor | None:
        """Bootstrap weights; None without resampling, or where there is one unit only."""
        if settings.resamples == 0 or self.units.count < 2:
            return None
        return draw_weights(self.units, settings.resamples, seed=(settings.seed, salt))


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


def collect_sets(
    pipeline: VideoPipeline, splits: dict[str, ClipSet], settings: EvaluationConfig, report: Report
) -> tuple[dict[str, ClipGroup], list[GenerationRequest]]:
    """Samples; as many training windows of each label, evenly spread; and all test windows.

    As many, for a distance depends on the number; of each label, so that only the pictures differ, not the mix.

    Raises:
        TrainingError: No training window has a label of the checkpoint, or the windows are of another shape.
    """
    labels = list(pipeline.manifest.labels)
    conditions = [pipeline.config.condition_indices(label.condition) for label in labels]
    of_window = {name: _label_numbers(clips.conditions, conditions) for name, clips in splits.items()}
    counts = [int((of_window["train"] == index).sum()) for index in range(len(labels))]
    if sum(counts) == 0:
        raise TrainingError(
            f"no training clip has a label of {pipeline.manifest.name}: {', '.join(label.name for label in labels)}"
        )
    given = allocate_labels(counts, settings.num_samples)
    asked = [index for index, count in enumerate(given) for _ in range(count)]
    requests = [
        resolve_request(
            pipeline.manifest,
            label=labels[index].name,
            seed=settings.seed + number,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            sampler=settings.sampler,
        )
        for number, index in enumerate(asked)
    ]
    ours, test = requests[0], splits["test"]
    shapes = (ours.num_frames, ours.height, ours.width), (test.num_frames, *test.frames.shape[1:3])
    if shapes[0] != shapes[1]:
        raise TrainingError(
            f"generated clips are {shapes[0]} (frames, height, width), the data's windows {shapes[1]}: set "
            "data.num_frames, data.height and data.width"
        )
    report(f"sampling {len(asked)} clips: " + ", ".join(f"{labels[i].name} {asked.count(i)}" for i in sorted({*asked})))
    made: list[np.ndarray] = []
    for start in range(0, len(requests), settings.batch_size):
        made += pipeline(requests[start : start + settings.batch_size])
        report(f"  {len(made)} of {len(requests)} clips")
    device = splits["train"].frames.device
    sets = {
        "samples": ClipGroup(
            clips=torch.from_numpy(np.stack(made)).to(device),
            labels=torch.tensor(asked),
            units=generated_units(len(asked)),
        )
    }
    of_label = [(of_window["train"] == index).nonzero()[:, 0] for index in range(len(labels))]
    chosen = [spread(rows, count) for rows, count in zip(of_label, given, strict=True)]
    for name, clips in splits.items():
        windows = torch.cat(chosen).to(device) if name == "train" else evenly(clips, len(clips))
        sets[name] = ClipGroup(
            clips=cut_windows(clips, windows),
            labels=of_window[name][windows.cpu()],
            units=units_of_windows(clips, windows),
        )
    return sets, requests


def _label_numbers(conditions: Tensor, of_labels: Sequence[tuple[int, ...]]) -> Tensor:
    """(windows,) on the CPU: which label's condition each window has, -1 for none."""
    numbers = torch.full((len(conditions),), -1)
    for index, condition in enumerate(of_labels):
        numbers[(conditions.cpu() == torch.tensor(condition)).all(1)] = index
    return numbers


def spread(rows: Tensor, count: int) -> Tensor:
    """``count`` of the rows, evenly spread (all of them when there are no more)."""
    count = min(count, len(rows))
    return rows[torch.linspace(0, max(0, len(rows) - 1), count, device=rows.device).round().long()]


def evenly(clips: ClipSet, count: int) -> Tensor:
    """``count`` window indices spread evenly over all windows (all of them when there are no more)."""
    return spread(torch.arange(len(clips), device=clips.frames.device), count)


def windows_of(clips: ClipSet, windows: Tensor) -> ClipSet:
    """The same clips with some of the windows."""
    return replace(
        clips,
        starts=clips.starts[windows],
        strides=clips.strides[windows],
        clips=clips.clips[windows],
        conditions=clips.conditions[windows],
    )


def cut_windows(clips: ClipSet, indices: Tensor) -> Tensor:
    return clips.gather(indices, torch.zeros_like(indices, dtype=torch.bool))


def subset_units(units: Units, rows: Tensor) -> Units:
    _, member = torch.unique(units.member[rows], return_inverse=True)
    return Units(kind=units.kind, member=member)


@torch.no_grad()
def through_autoencoder(autoencoder: VideoAutoencoder, clips: Tensor) -> Tensor:
    """Clips through the autoencoder, as uint8."""
    dtype = autoencoder.latent_mean.dtype
    return torch.cat(
        [
            to_uint8(autoencoder.decode(autoencoder.encode(from_uint8(clips[rows]).to(dtype))))
            for rows in index_batches(len(clips), RECONSTRUCTION_BATCH, clips.device)
        ]
    )
