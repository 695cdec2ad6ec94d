"""Confidence intervals by the bootstrap: which clips may have been others, and how far a figure then moves.

Clips are resampled, never frames: frames of one clip are nearly the same picture. Generated clips are independent,
each is drawn by itself. Windows of real clips are not: they are drawn by patient where there are enough of them, else
by source clip, so that an interval says what other patients (or clips) might have given. The kind is named with every
interval. Percentile intervals: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data.clips import ClipSet

__all__ = [
    "CONFIDENCE",
    "FEWEST_UNITS",
    "Interval",
    "Units",
    "draw_weights",
    "generated_units",
    "mean_interval",
    "percentile_interval",
    "units_of_windows",
]

CONFIDENCE = 0.95
FEWEST_UNITS = 5
"""With fewer patients (or clips) than this, resampling them gives no more than a handful of different sets."""
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """What is drawn as one: patients, source clips, or single clips."""

    kind: str
    """``patients``, ``clips``, ``windows`` or ``generated clips``."""
    member: Tensor
    """(n,) int64 on the CPU: the unit that each clip belongs to, 0 to ``count - 1``."""

    @property
    def count(self) -> int:
        """Number of units."""
        return int(self.member.max()) + 1

    def __str__(self) -> str:
        return f"{self.count} {self.kind}"


def generated_units(count: int) -> Units:
    """Generated clips: each by itself, for each has its own seed."""
    return Units(kind="generated clips", member=torch.arange(count))


def units_of_windows(clips: ClipSet, windows: Tensor) -> Units:
    """Units of real windows: patients when there are at least five, else source clips, else the windows themselves.

    Args:
        windows: (n,) int64, indices of windows of ``clips``.
    """
    sources = clips.clips[windows].tolist()
    names = {
        "patients": [(clips.records[source].dataset, clips.records[source].group) for source in sources],
        "clips": sources,
    }
    for kind, owners in names.items():
        numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
        if len(numbers) >= FEWEST_UNITS:
            return Units(kind=kind, member=torch.tensor([numbers[owner] for owner in owners]))
    return Units(kind="windows", member=torch.arange(len(sources)))


def draw_weights(units: Units, resamples: int, *, seed: int | Sequence[int]) -> Tensor:
    """How often each clip is in each resample: as many units as there are, drawn with replacement.

    Args:
        seed: Of numpy's generator; the same weights on every machine.

    Returns:
        (resamples, n) float64 on the CPU, whole numbers.
    """
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(units.count, np.full(units.count, 1 / units.count), size=resamples)
    return torch.from_numpy(counts).double()[:, units.member]


def percentile_interval(values: Tensor, *, estimate: float | None = None) -> Interval:
    """The middle 95 % of what the resamples gave.

    Args:
        values: (resamples,) figure of each resample.
        estimate: Of the clips as they are. Given for figures that rise when clips are few (Frechet distances): a
            resample has fewer different clips than the set it is drawn from, so all its values are too high by about
            the same amount. They are moved so that their mean is the estimate.
    """
    tail = (1 - CONFIDENCE) / 2
    moved = values.double() if estimate is None else values.double() - values.double().mean() + estimate
    low, high = torch.quantile(moved.cpu(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def mean_interval(values: Tensor, weights: Tensor) -> Interval:
    """Interval of the mean of one number a clip.

    Args:
        values: (n,), finite.
        weights: (resamples, n) of :func:`draw_weights`.
    """
    numbers = values.double().cpu()
    return percentile_interval((weights @ numbers) / weights.sum(dim=1))
