"""Which samples are copies of training clips: the nearest one, a threshold, and how well the threshold works.

Resemblance is the correlation of two clips in grey at 32x32 pixels, all frames together, after the mean training
picture is taken away: all clips of one kind of probe share a sector and a depth gradient, which say nothing. Each clip
is first brought to mean 0 and variance 1, so that brightness and contrast do not count; mirrored training windows count
too, and the best of small shifts (up to 4 pixels of 128) is taken.

The threshold comes from real clips of patients who are not in the training data: test patients, and each training
patient compared with all others. It is the 99th percentile of the patient who resembles the others most. False alarms
are measured by leaving out one patient at a time; recall on planted copies (:mod:`training.evaluation.planted`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from training.data.clips import ClipSet, index_batches

__all__ = ["Nearest", "Threshold", "TrainingIndex", "calibrate"]

SIZE = 32
FINE = 2 * SIZE
"""Shifts are made at this size: one of its pixels is half of one that is compared."""
MAX_SHIFT = 2
CANDIDATES = 32
"""Windows that are compared with shifts, after all were without."""
WINDOW_BATCH = 1024
QUERY_BATCH = 8
QUANTILE = 0.99


@dataclass(frozen=True, kw_only=True, eq=False)
class Nearest:
    """The training window that each clip resembles most."""

    resemblance: Tensor
    """(n,) float32, -1 to 1; 1 is a copy."""
    window: Tensor
    """(n,) int64, index of the window; all on the CPU."""
    is_mirrored: Tensor
    """(n,) bool."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """From which resemblance on a clip counts as a copy."""

    value: float
    set_by: str
    """The patient whose clips resemble those of others most."""
    per_patient: dict[str, float]
    """99th percentile of each patient's resemblance to the training clips of others."""
    false_alarms: dict[str, float] | None
    """Share of each patient's clips above the threshold that the other patients alone would set; None with one
    patient only."""


class TrainingIndex:
    """All training windows, ready to be searched. Holds small grey pictures of every frame, once."""

    def __init__(self, training: ClipSet) -> None:
        self._training = training
        batches = index_batches(len(training.frames), 512, training.frames.device)
        self._frames = torch.cat([F.avg_pool2d(_small(training.frames[rows]), 2).half() for rows in batches])
        names = [f"{record.dataset}/{record.group}" for record in training.records]
        self.patients = tuple(dict.fromkeys(names))
        numbers = torch.tensor([self.patients.index(name) for name in names])
        self.patient_of_window = numbers.to(training.clips.device)[training.clips]
        self._mean_picture = self._measure_mean_picture()

    def __len__(self) -> int:
        return len(self._training)

    def nearest(self, clips: UInt8[Tensor, "n f h w 3"], *, without_patient: int | None = None) -> Nearest:
        """Find the window that each clip resembles most.

        Args:
            clips: As many frames as the windows have; of any size.
            without_patient: Leave out this patient's windows, to see what others' clips resemble by chance.
        """
        device = self._frames.device
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        allowed = torch.ones(len(self), dtype=torch.bool, device=device)
        if without_patient is not None:
            allowed = self.patient_of_window != without_patient
        windows = allowed.nonzero()[:, 0]
        for rows in index_batches(len(clips), 256, clips.device):
            fine = torch.stack([_small(clip) for clip in clips[rows]]).to(device)
            flat = self._normalise(F.avg_pool2d(fine, 2))
            scores, places, flips = self._candidates(flat, windows)
            for start in range(0, len(fine), QUERY_BATCH):
                part = slice(start, start + QUERY_BATCH)
                found.append(self._refine(fine[part], scores[part], places[part], flips[part]))
        values, window, flip = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        return Nearest(resemblance=values, window=window, is_mirrored=flip)

    def _candidates(self, flat: Tensor, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Best windows without shifts: (n, k) resemblances, windows, and whether mirrored."""
        best = flat.new_full((len(flat), 0), 0.0)
        places = torch.zeros(len(flat), 0, dtype=torch.int64, device=flat.device)
        flips = torch.zeros(len(flat), 0, dtype=torch.bool, device=flat.device)
        for chunk in torch.split(windows, WINDOW_BATCH):
            for is_flipped in (False, True):
                mirrored = torch.full_like(chunk, is_flipped, dtype=torch.bool)
                best = torch.cat([best, flat @ self._keys(chunk, mirrored).T], dim=1)
                places = torch.cat([places, chunk.expand(len(flat), -1)], dim=1)
                flips = torch.cat([flips, mirrored.expand(len(flat), -1)], dim=1)
                top = best.topk(min(CANDIDATES, best.shape[1]), dim=1)
                best, places, flips = top.values, places.gather(1, top.indices), flips.gather(1, top.indices)
        return best, places, flips

    def _refine(self, fine: Tensor, scores: Tensor, places: Tensor, flips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best candidate of each clip when the clip may be shifted a little."""
        keys = self._keys(places.flatten(), flips.flatten()).reshape(*places.shape, -1)
        padded = F.pad(fine, (MAX_SHIFT,) * 4, mode="replicate")
        best = scores
        for down in range(2 * MAX_SHIFT + 1):
            for right in range(2 * MAX_SHIFT + 1):
                moved = padded[:, :, down : down + FINE, right : right + FINE]
                flat = self._normalise(F.avg_pool2d(moved, 2))
                best = torch.maximum(best, torch.einsum("nd,nkd->nk", flat, keys))
        values, position = best.clamp(-1, 1).max(dim=1, keepdim=True)
        return values[:, 0], places.gather(1, position)[:, 0], flips.gather(1, position)[:, 0]

    def _keys(self, windows: Tensor, mirrored: Tensor) -> Tensor:
        frames = self._window_frames(windows)
        return self._normalise(torch.where(mirrored[:, None, None, None], frames.flip(-1), frames))

    def _window_frames(self, windows: Tensor) -> Tensor:
        """(n f s s) float32."""
        training = self._training
        offsets = torch.arange(training.num_frames, device=self._frames.device)
        rows = training.starts[windows, None] + training.strides[windows, None] * offsets
        return self._frames[rows].float()

    def _normalise(self, frames: Tensor) -> Tensor:
        """(n f s s) -> unit vectors (n d) without the mean training picture."""
        picture = self._mean_picture
        centred = _standardise(frames.flatten(1)) - picture.expand(frames.shape[1], -1, -1).flatten()
        return F.normalize(centred - centred.mean(dim=1, keepdim=True), dim=1)

    def _measure_mean_picture(self) -> Tensor:
        """Mean (s s) over windows and their mirror images; patients weigh the same, however many windows they have."""
        total = torch.zeros(SIZE, SIZE, device=self._frames.device)
        for patient in range(len(self.patients)):
            own = (self.patient_of_window == patient).nonzero()[:, 0]
            if len(own) == 0:
                continue
            some = own[torch.linspace(0, len(own) - 1, min(len(own), 256), device=own.device).long()]
            frames = self._window_frames(some)
            total += _standardise(frames.flatten(1)).reshape(frames.shape).mean(dim=(0, 1))
        total = total / max(1, len(set(self.patient_of_window.tolist())))
        return (total + total.flip(-1)) / 2


def calibrate(unseen: Mapping[str, Tensor]) -> Threshold:
    """Set the threshold from clips of patients whom the training windows do not show.

    Args:
        unseen: Resemblance (n,) of each patient's clips to the training windows of others.
    """
    per_patient = {name: float(torch.quantile(values.float(), QUANTILE)) for name, values in unseen.items()}
    set_by = max(per_patient, key=lambda name: per_patient[name])
    alarms = None
    if len(unseen) > 1:
        alarms = {
            name: float((values > max(bar for other, bar in per_patient.items() if other != name)).float().mean())
            for name, values in unseen.items()
        }
    return Threshold(value=per_patient[set_by], set_by=set_by, per_patient=per_patient, false_alarms=alarms)


def _small(frames: Tensor) -> Tensor:
    """(f h w 3) uint8 -> (f s s) float32 in grey levels, at the fine size."""
    grey = frames.float().mean(dim=-1)
    return F.interpolate(grey[:, None], size=(FINE, FINE), mode="area")[:, 0]


def _standardise(flat: Tensor) -> Tensor:
    flat = flat.float()
    centred = flat - flat.mean(dim=1, keepdim=True)
    scaled: Tensor = centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-3)
    return scaled
