"""Black borders around the picture: rows and columns at the edges that stay dark. Torch-free."""

from collections.abc import Sequence

import numpy as np

from training.prepare.config import Box
from training.prepare.pixels import brightest

__all__ = ["BorderFinder"]

DARK_LEVEL = 16
"""Limited-range black after compression noise."""
OFTEN = 0.05
"""A pixel belongs to the picture when it is brighter in this share of frames: a flash lights up borders, too."""
BRIGHT_SHARE = 0.01
"""A row counts as dark while no more of its pixels than this belong to the picture: a stray speck is none."""
LEAST_SHARE = 0.01
"""Borders thinner than this share of the side are an encoder's, and not reported."""


class BorderFinder:
    """Takes some frames of one source, and says where its picture is."""

    def __init__(self) -> None:
        self._frames = 0
        self._counts = np.zeros((0, 0), dtype=np.uint16)

    def add(self, frame: np.ndarray) -> None:
        """Look at a frame: uint8 RGB (height, width, 3)."""
        bright = brightest(frame) > DARK_LEVEL
        self._counts = bright.astype(np.uint16) if not self._frames else self._counts + bright
        self._frames += 1

    def picture(self, ignored: Sequence[Box] = ()) -> Box | None:
        """The picture inside the borders; None when there is no border, or no picture.

        Args:
            ignored: Places that count as dark, such as letters in the border.
        """
        if not self._frames:
            return None
        is_picture = self._counts >= max(1.0, OFTEN * self._frames)
        for box in ignored:
            is_picture[box.top : box.bottom, box.left : box.right] = False
        rows = np.flatnonzero(is_picture.mean(axis=1) > BRIGHT_SHARE)
        columns = np.flatnonzero(is_picture.mean(axis=0) > BRIGHT_SHARE)
        if not len(rows) or not len(columns):
            return None
        height, width = is_picture.shape
        top, bottom = _edges(rows, height)
        left, right = _edges(columns, width)
        if (top, left, bottom, right) == (0, 0, height, width):
            return None
        return Box(left=left, top=top, width=right - left, height=bottom - top)


def _edges(inside: np.ndarray, size: int) -> tuple[int, int]:
    first, end, least = int(inside[0]), int(inside[-1]) + 1, max(2, LEAST_SHARE * size)
    return first if first >= least else 0, end if size - end >= least else size
