"""Fingerprints of a checkpoint's training clips, and from which resemblance on a clip counts as a copy of one.

The bar is the 95th percentile of the resemblance of held-out windows, whose patients are not in the training data: one
real window in twenty passes for a copy. It is checked from both sides. Copies are planted: training windows between
those that have a fingerprint, altered in every way of :mod:`training.evaluation.planted`, must be found. And of each
training patient it is counted how many windows would be taken for copies of the others'.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from medsora.checkpoint import add_fingerprints, load_checkpoint
from medsora.config import ModelConfig
from medsora.fingerprints import TrainingFingerprints, fingerprint
from medsora.manifest import Manifest
from training.config import DataConfig
from training.data.clips import ClipSet
from training.errors import DataError
from training.evaluation.bootstrap import CONFIDENCE, draw_weights, units_of_windows
from training.evaluation.planted import planted_copies
from training.evaluation.sets import cut_windows, evenly, spread, through_autoencoder
from training.runs import load_split

__all__ = ["MAX_FINGERPRINTS", "fingerprint_checkpoint"]

MAX_FINGERPRINTS = 2048
"""Of training windows, 1 KiB each."""
CANDIDATES = 16_384
"""Windows that the fingerprints are chosen from."""
HELD_OUT_QUANTILE = 0.95
PLANTED = 200
PLANTED_THROUGH_AUTOENCODER = 32
WINDOWS_OF_A_PATIENT = 64
RESAMPLES = 1000
SEED = 0
Report = Callable[[str], None]
Frames = np.ndarray[Any, np.dtype[np.uint8]]


def fingerprint_checkpoint(
    directory: Path,
    table: Path,
    data: DataConfig,
    model: ModelConfig,
    *,
    count: int = MAX_FINGERPRINTS,
    planted: int = PLANTED,
    report: Report = print,
) -> Manifest:
    """Put fingerprints of its training clips into a checkpoint, with the bar and how well it works.

    Args:
        table, data, model: As for :func:`training.runs.load_split`.
        count: Most fingerprints; of more windows those are taken that stand for the others best.
        planted: Training windows of which copies are made.

    Returns:
        The manifest as written.
    """
    device = torch.device("cpu")
    train = load_split(table, data, model, "train", device=device)
    windows = evenly(train, CANDIDATES)
    candidates = [fingerprint(clip) for clip in _windows(train, windows)]
    taken = TrainingFingerprints(b"".join(candidates)).representatives(count)
    chosen, marks = windows[taken], [candidates[number] for number in taken]
    joined = b"".join(marks)
    report(f"{len(marks)} fingerprints of {len(train)} training windows")
    try:
        test = load_split(table, data, model, "test", device=device)
    except DataError as error:
        report(f"not calibrated, there is nothing held out: {error}")
        return add_fingerprints(directory, joined)
    known = TrainingFingerprints(joined)
    held_out = _resemblances(known, test, torch.arange(len(test)))
    bar = float(torch.quantile(held_out, HELD_OUT_QUANTILE))
    units = units_of_windows(test, torch.arange(len(test)))
    report(f"held out: {len(test)} windows of {units}, the bar is {bar:.4f}")
    figures: dict[str, Any] = {
        "unit": "correlation of 4 moments of 16x16 pixels, best of mirrored, moved and resized",
        "fingerprints": len(marks),
        "held_out": {
            "windows": len(test),
            "units": str(units),
            "median": round(float(held_out.median()), 4),
            "highest": round(float(held_out.max()), 4),
            "bar_interval": _bar_interval(held_out, draw_weights(units, RESAMPLES, seed=SEED)),
        },
        "training_patients_against_others": _others(train, chosen, marks, bar),
    }
    report(f"training patients against others: {figures['training_patients_against_others']}")
    figures["planted"] = {}
    for name, copies in _planted(directory, train, chosen, planted):
        found = torch.tensor([known.resemblance(clip.numpy()) for clip in copies])
        figures["planted"][name] = {
            **_share(int((found > bar).sum()), len(found)),
            "lowest": round(float(found.min()), 4),
        }
        report(f"planted, {name}: {figures['planted'][name]}")
    return add_fingerprints(directory, joined, max_resemblance=round(bar, 4), metrics=figures)


def _windows(clips: ClipSet, windows: Tensor) -> Iterator[Frames]:
    """One window after another, uint8 ``(frames, height, width, 3)``."""
    return (cut_windows(clips, window)[0].numpy() for window in windows[:, None])


def _resemblances(known: TrainingFingerprints, clips: ClipSet, windows: Tensor) -> Tensor:
    return torch.tensor([known.resemblance(clip) for clip in _windows(clips, windows)])


def _others(train: ClipSet, chosen: Tensor, marks: list[bytes], bar: float) -> dict[str, Any]:
    """Of each training patient, how many windows would pass for copies of the others'."""
    owners = [f"{record.dataset}/{record.group}" for record in train.records]
    of_window = [owners[clip] for clip in train.clips.tolist()]
    shares: dict[str, Any] = {}
    for patient in dict.fromkeys(owners):
        others = [mark for mark, window in zip(marks, chosen.tolist(), strict=True) if of_window[window] != patient]
        own = torch.tensor([number for number, owner in enumerate(of_window) if owner == patient])
        if not others or len(own) == 0:
            continue
        some = spread(own, WINDOWS_OF_A_PATIENT)
        found = _resemblances(TrainingFingerprints(b"".join(others)), train, some)
        shares[patient] = _share(int((found > bar).sum()), len(found))
    return shares


def _planted(directory: Path, train: ClipSet, chosen: Tensor, count: int) -> list[tuple[str, Tensor]]:
    """Altered training windows, those that have no fingerprint of their own where there are such."""
    between = torch.ones(len(train), dtype=torch.bool)
    between[chosen] = False
    rows = between.nonzero()[:, 0] if bool(between.any()) else torch.arange(len(train))
    drawn = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))[:count]]
    originals = cut_windows(train, drawn)
    made = planted_copies(originals, seed=SEED)
    autoencoder = load_checkpoint(directory).autoencoder
    if autoencoder is not None:
        some = originals[:PLANTED_THROUGH_AUTOENCODER]
        through = planted_copies(some, reconstruct=lambda clips: through_autoencoder(autoencoder, clips), seed=SEED)
        made |= {name: copies for name, copies in through.items() if name not in made}
    return list(made.items())


def _share(count: int, total: int) -> dict[str, Any]:
    """A share with its exact (Clopper-Pearson) interval."""
    interval = binomtest(count, total).proportion_ci(confidence_level=CONFIDENCE, method="exact")
    return {
        "share": round(count / total, 4),
        "count": count,
        "of": total,
        "interval": [round(float(interval.low), 4), round(float(interval.high), 4)],
    }


def _bar_interval(values: Tensor, weights: Tensor) -> list[float]:
    """Where the bar would lie with other clips of the same kind: resampled as a whole, not window by window."""
    tail = (1 - CONFIDENCE) / 2
    bars = torch.stack(
        [torch.quantile(values.repeat_interleave(weight.long()), HELD_OUT_QUANTILE) for weight in weights]
    )
    return [round(float(bound), 4) for bound in torch.quantile(bars, torch.tensor([tail, 1 - tail]))]
