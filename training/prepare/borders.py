"""Black borders around the picture: rows and columns at the edges that stay dark in every frame. Torch-free."""

import numpy as np

from training.prepare.config import Box

__all__ = ["BorderFinder"]

DARK_LEVEL = 16
"""Limited-range black after compression noise."""
BRIGHT_SHARE = 0.01
"""A row counts as dark while no more of its pixels than this are brighter: a stray speck is no picture."""
LEAST_SHARE = 0.01
"""Borders thinner than this share of the side are an encoder's, and not reported."""


class BorderFinder:
    """Takes some frames of one source, and says where its picture is."""

    def __init__(self) -> None:
        self._rows: np.ndarray | None = None
        self._columns: np.ndarray | None = None

    def add(self, frame: np.ndarray) -> None:
        """Look at a frame: uint8 RGB (height, width, 3)."""
        bright = frame.max(axis=2) > DARK_LEVEL
        rows, columns = bright.mean(axis=1), bright.mean(axis=0)
        if self._rows is None or self._columns is None:
            self._rows, self._columns = rows, columns
        else:
            np.maximum(self._rows, rows, out=self._rows)
            np.maximum(self._columns, columns, out=self._columns)

    def picture(self) -> Box | None:
        """The picture inside the borders; None when there is no border, or no picture."""
        if self._rows is None or self._columns is None:
            return None
        rows = np.flatnonzero(self._rows > BRIGHT_SHARE)
        columns = np.flatnonzero(self._columns > BRIGHT_SHARE)
        if not len(rows) or not len(columns):
            return None
        height, width = len(self._rows), len(self._columns)
        top, bottom = _edges(rows, height)
        left, right = _edges(columns, width)
        if (top, left, bottom, right) == (0, 0, height, width):
            return None
        return Box(left=left, top=top, width=right - left, height=bottom - top)


def _edges(inside: np.ndarray, size: int) -> tuple[int, int]:
    first, end, least = int(inside[0]), int(inside[-1]) + 1, max(2, LEAST_SHARE * size)
    return first if first >= least else 0, end if size - end >= least else size
