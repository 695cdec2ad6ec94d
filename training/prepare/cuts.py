"""Finds hard cuts: a frame that no small motion explains, and that stands out from the frames around it.

Fades and dissolves are not found. Torch-free.
"""

from typing import Any

import numpy as np

from training.prepare.pixels import area_mean, luminance

__all__ = ["SIDE", "CutDetector", "find_cuts", "small_grey"]

SIDE = 32
"""Frames are compared at 32x32 pixels."""
SHIFT, BLOCK = 3, 8
# Chosen on spliced real clips (docs/training-data.md). The 85 % quantile, not the median, of the neighbours: in a
# video with repeated frames most differences are zero, and every real one stands out from those.
FLOOR, RATIO, QUANTILE, REACH = 4.0, 2.5, 0.85, 8

Grey = np.ndarray[Any, np.dtype[np.float32]]


def small_grey(frame: np.ndarray) -> Grey:
    """Luminance (BT.601) of a frame, averaged to 32x32.

    Args:
        frame: uint8 RGB (height, width, 3) of any size.
    """
    return area_mean(luminance(frame), SIDE)


class CutDetector:
    """Takes the frames of one clip one by one, and says at the end where scenes begin."""

    def __init__(self) -> None:
        self._previous: Grey | None = None
        self._scores: list[float] = []

    def add(self, grey: Grey) -> None:
        """Take the next frame, as :func:`small_grey` gives it."""
        if self._previous is None:
            self._scores.append(0.0)
        else:
            # both ways: what is uncovered behind a moving thing is found in one of them
            forth, back = _residual(grey, self._previous), _residual(self._previous, grey)
            self._scores.append((forth + back) / 2)
        self._previous = grey

    def cuts(self) -> list[int]:
        """Rising indices of frames that begin a scene, without the first."""
        return find_cuts(self._scores)


def find_cuts(scores: list[float]) -> list[int]:
    """Indices whose score is high, and high above the scores around it.

    Args:
        scores: Motion-compensated difference of each frame to the one before, in grey levels; the first is 0.
    """
    found = []
    for index in range(1, len(scores)):
        if scores[index] < FLOOR:
            continue
        around = scores[max(1, index - REACH) : index] + scores[index + 1 : index + 1 + REACH]
        if not around or scores[index] >= RATIO * float(np.quantile(around, QUANTILE)):
            found.append(index)
    return found


def _residual(grey: Grey, reference: Grey) -> float:
    """Mean difference that is left when every 8x8 block may be moved by up to three pixels."""
    padded = np.pad(reference, SHIFT, mode="edge")
    shifted = np.lib.stride_tricks.sliding_window_view(padded, (SIDE, SIDE))
    shifts, blocks = 2 * SHIFT + 1, SIDE // BLOCK
    error = np.abs(shifted - grey).reshape(shifts, shifts, blocks, BLOCK, blocks, BLOCK).mean((3, 5))
    return float(error.reshape(shifts * shifts, -1).min(axis=0).mean())
