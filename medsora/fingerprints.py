"""Small grey pictures of clips, by which those that are alike are found. Torch-free.

Two clips of one dataset are compared in place, in grey levels (:class:`FingerprintSet`). A copy of a training clip may
be mirrored, moved, enlarged, brighter or darker, so there the best correlation of many variants counts
(:class:`TrainingFingerprints`).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["FINGERPRINT_BYTES", "FingerprintSet", "TrainingFingerprints", "fingerprint"]

Frames = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

_SIDE, _TIMES, _BLOCK = 16, 4, 4
FINGERPRINT_BYTES = _TIMES * _SIDE * _SIDE
_SUMS = FINGERPRINT_BYTES // _BLOCK**2
_NEAREST_FIRST, _EXACT_AT_ONCE = 32, 1024
_SHIFTS = (-1 / 32, -1 / 64, 0.0, 1 / 64, 1 / 32)
"""Of width and height, both ways."""
_ZOOMS = (0.95, 1.0, 1.05)


def fingerprint(frames: Frames) -> bytes:
    """A small grey picture of the clip: 4 moments of 16x16 pixels, uint8, each the mean of the pixels it stands for.

    Args:
        frames: uint8 RGB ``(frames, height, width, 3)``.
    """
    grey = _moments(frames)
    down, right = (_box_weights(length, 0.0, 1.0) for length in grey.shape[1:])
    return (down @ grey @ right.T).round().clip(0, 255).astype(np.uint8).tobytes()


class FingerprintSet:
    """Fingerprints by a number of their own, of which the nearest one is found exactly without looking at all.

    Sums over blocks of 4x4 pixels bound a distance from below: the square of a sum of differences is no more than
    their number times the sum of their squares. Only those whose bound is below the nearest found are compared pixel
    by pixel. All is in whole numbers, so nothing is rounded. One clip takes 1.2 KiB.
    """

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._marks = np.empty((0, FINGERPRINT_BYTES), np.uint8)
        self._sums = np.empty((0, _SUMS), np.int16)

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, numbers: Sequence[int], marks: Sequence[bytes]) -> None:
        """Add fingerprints, in place of those that had the same numbers."""
        rows = [self._rows.setdefault(number, len(self._rows)) for number in numbers]
        if len(self._rows) > len(self._marks):
            room = max(len(self._rows), 2 * len(self._marks)) - len(self._marks)
            self._marks = np.concatenate([self._marks, np.zeros((room, FINGERPRINT_BYTES), np.uint8)])
            self._sums = np.concatenate([self._sums, np.zeros((room, _SUMS), np.int16)])
        stacked = np.frombuffer(b"".join(marks), np.uint8).reshape(-1, FINGERPRINT_BYTES)
        self._marks[rows] = stacked
        self._sums[rows] = _block_sums(stacked)

    def nearest(self, mark: bytes, *, without: int | None = None) -> float:
        """Root mean square difference in grey levels (0 to 255) to the nearest one; infinite where there is none.

        Args:
            without: A number whose fingerprint does not count.
        """
        count = len(self._rows)
        mine = np.frombuffer(mark, np.uint8)
        differences = self._sums[:count] - _block_sums(mine[None])
        bounds = np.einsum("nk,nk->n", differences, differences, dtype=np.int64)
        open_rows = np.ones(count, bool)
        if without in self._rows:
            open_rows[self._rows[without]] = False
        rows = open_rows.nonzero()[0]
        if len(rows) == 0:
            return float("inf")
        first = rows[np.argsort(bounds[rows], kind="stable")[:_NEAREST_FIRST]]
        best = self._least(mine, first)
        open_rows[first] = False
        rest = (open_rows & (bounds < _BLOCK**2 * best)).nonzero()[0]
        for begin in range(0, len(rest), _EXACT_AT_ONCE):
            best = min(best, self._least(mine, rest[begin : begin + _EXACT_AT_ONCE]))
        return float(np.sqrt(best / FINGERPRINT_BYTES))

    def _least(self, mine: Frames, rows: np.ndarray[Any, Any]) -> int:
        """Least sum of squared differences."""
        differences = self._marks[rows].astype(np.int16) - mine
        return int(np.einsum("nk,nk->n", differences, differences, dtype=np.int64).min())


class TrainingFingerprints:
    """Fingerprints of the training clips of a model, to tell copies of them by.

    Resemblance is the correlation of two fingerprints, each brought to mean 0 and variance 1, after the mean training
    picture is taken away: all clips of one kind of probe share a sector and a depth gradient, which say nothing. The
    clip is compared as it is, mirrored, moved by up to a thirty-second of its width and height, and 5 % larger or
    smaller; the best counts. The same idea as ``training/evaluation/memorisation.py``, on pictures that are small
    enough for a checkpoint.

    Args:
        marks: Of :func:`fingerprint`, one behind another.
    """

    def __init__(self, marks: bytes) -> None:
        pictures = np.frombuffer(marks, np.uint8).reshape(-1, FINGERPRINT_BYTES)
        standard = _standardised(pictures.astype(np.float32))
        common = standard.reshape(-1, _SIDE, _SIDE).mean(axis=0)
        common = (common + common[:, ::-1]) / 2
        self._common: Floats = np.tile(common.ravel(), _TIMES)
        self._directions = self._direction(standard)

    def __len__(self) -> int:
        return len(self._directions)

    def resemblance(self, frames: Frames) -> float:
        """Resemblance of a clip to the training clip that it resembles most, -1 to 1; 1 is a copy.

        Args:
            frames: uint8 RGB ``(frames, height, width, 3)``, of any size.
        """
        found = self._direction(_standardised(_variants(frames))) @ self._directions.T
        return float(found.max().clip(-1, 1))

    def representatives(self, count: int) -> list[int]:
        """Numbers of at most ``count`` fingerprints that stand for all, rising.

        Each is the one that resembles those before it least (farthest-first traversal; Gonzalez 1985), so that what is
        rare is among them and no clip is far from all of them.
        """
        chosen: list[int] = []
        nearest = np.full(len(self), -np.inf, np.float32)
        while len(chosen) < min(count, len(self)):
            chosen.append(int(nearest.argmin()))
            nearest = np.maximum(nearest, self._directions @ self._directions[chosen[-1]])
            nearest[chosen] = np.inf  # also of one whose picture has no contrast, and so resembles nothing
        return sorted(chosen)

    def _direction(self, standard: Floats) -> Floats:
        centred = standard - self._common
        centred -= centred.mean(axis=1, keepdims=True)
        directions: Floats = centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-6)
        return directions


def _standardised(pictures: Floats) -> Floats:
    centred = pictures - pictures.mean(axis=1, keepdims=True)
    standard: Floats = centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True)).clip(1e-3)
    return standard


def _variants(frames: Frames) -> Floats:
    """Fingerprints, unrounded, of a clip that is moved, enlarged and mirrored."""
    grey = _moments(frames)
    made = []
    for zoom in _ZOOMS:
        down, right = (np.stack([_box_weights(length, shift, zoom) for shift in _SHIFTS]) for length in grey.shape[1:])
        rows = down[:, None] @ grey
        made.append(rows[:, None] @ right.transpose(0, 2, 1)[:, None])
    pictures = np.stack(made)
    both = np.stack([pictures, pictures[..., ::-1]])
    return np.asarray(both.reshape(-1, FINGERPRINT_BYTES), np.float32)


def _moments(frames: Frames) -> Floats:
    """Grey pictures of the moments that count, ``(4, height, width)``."""
    times = np.linspace(0, len(frames) - 1, _TIMES).round().astype(int)
    return np.asarray(frames[times].mean(axis=-1), np.float32)


@lru_cache(maxsize=64)
def _box_weights(length: int, shift: float, zoom: float) -> Floats:
    """What each of 16 equal stretches of an axis takes of each pixel, ``(16, length)``; rows add up to 1.

    Where 16 does not divide it, pixels count by their share; beyond its ends, the last pixel goes on.
    """
    edges = ((np.arange(_SIDE + 1) / _SIDE - 0.5) * zoom + 0.5 + shift) * length
    pixels = np.arange(np.floor(edges[0]), np.ceil(edges[-1]))
    shares = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = np.zeros((_SIDE, length))
    np.add.at(weights.T, pixels.clip(0, length - 1).astype(int), shares.clip(0, None).T)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def _block_sums(marks: Frames) -> np.ndarray[Any, np.dtype[np.int16]]:
    blocks = marks.reshape(-1, _TIMES, _SIDE // _BLOCK, _BLOCK, _SIDE // _BLOCK, _BLOCK)
    return np.asarray(blocks.sum(axis=(3, 5)), np.int16).reshape(-1, _SUMS)
