"""How many samples are copies of training clips, and how well the threshold for that works on these data."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from medsora.models.autoencoder import VideoAutoencoder
from training.data.clips import ClipSet
from training.evaluation.bootstrap import Interval
from training.evaluation.config import EvaluationConfig
from training.evaluation.memorisation import Nearest, TrainingIndex, calibrate
from training.evaluation.planted import planted_copies
from training.evaluation.sets import ClipGroup, cut_windows, evenly, spread, through_autoencoder

__all__ = ["measure_copies"]


def measure_copies(
    autoencoder: VideoAutoencoder,
    sets: dict[str, ClipGroup],
    splits: dict[str, ClipSet],
    names: Sequence[str],
    settings: EvaluationConfig,
) -> tuple[Nearest, dict[str, Any]]:
    train, test = splits["train"], splits["test"]
    index = TrainingIndex(train)
    nearest = index.nearest(sets["samples"].clips)
    unseen: dict[str, Tensor] = {}
    resembled = index.nearest(sets["test"].clips).resemblance
    for name, rows in _rows_by_patient(test).items():
        unseen[name] = resembled[rows]
    if len(index.patients) > 1:
        for number, name in enumerate(index.patients):
            own = (index.patient_of_window == number).nonzero()[:, 0]
            if len(own) == 0 or len(own) == len(train):
                continue
            some = spread(own, settings.windows_of_a_patient)
            unseen[f"{name} (train)"] = index.nearest(cut_windows(train, some), without_patient=number).resemblance
    threshold = calibrate(unseen)
    originals = cut_windows(train, evenly(train, settings.planted))
    copies = planted_copies(
        originals, reconstruct=lambda clips: through_autoencoder(autoencoder, clips), seed=settings.seed % 2**31
    )
    planted = {}
    for name, clips in copies.items():
        found = index.nearest(clips).resemblance
        planted[name] = {
            "count": len(found),
            "lowest": float(found.min()),
            "recall": _proportion(int((found >= threshold.value).sum()), len(found)),
        }

    def summary(values: Tensor) -> dict[str, Any]:
        return {
            "count": len(values),
            "median": float(values.median()),
            "highest": float(values.max()),
            "copies": _proportion(int((values >= threshold.value).sum()), len(values)),
        }

    labels = sets["samples"].labels
    return nearest, {
        "windows": len(train),
        "threshold": asdict(threshold),
        "samples": summary(nearest.resemblance),
        "unseen": summary(torch.cat(list(unseen.values()))),
        "by_label": {
            name: summary(nearest.resemblance[labels == number])
            for number, name in enumerate(names)
            if bool((labels == number).any())
        },
        "planted": planted,
    }


def _rows_by_patient(clips: ClipSet) -> dict[str, Tensor]:
    owners = [f"{clips.records[clip].dataset}/{clips.records[clip].group}" for clip in clips.clips.tolist()]
    return {
        f"{name} (test)": torch.tensor([row for row, owner in enumerate(owners) if owner == name])
        for name in dict.fromkeys(owners)
    }


def _proportion(count: int, total: int) -> dict[str, Any]:
    """A share with its exact (Clopper-Pearson) interval: a bootstrap of no copies at all would be sure of none."""
    interval = binomtest(count, total).proportion_ci(confidence_level=0.95, method="exact")
    bounds: Interval = (float(interval.low), float(interval.high))
    return {"value": count / total, "count": count, "interval": list(bounds)}
