"""Text and symbols burned into the picture: thin bright strokes that stand still while the rest moves. Torch-free.

A check, not a proof: it sees neither dark letters nor letters that are there for a short time only, and a still
reflection can look like one. What it finds is shown in the report.
"""

import math

import numpy as np
from scipy import ndimage

from training.prepare.config import Box
from training.prepare.pixels import luminance

__all__ = ["OverlayFinder"]

MAX_SIDE = 640
"""Larger frames are looked at at a whole fraction of their size."""
STROKE = 5
"""Strokes are narrower than this, in pixels."""
CONTRAST, STILLNESS, MOTION = 60.0, 5.0, 3.0
"""Grey levels: a stroke over its background, its deviation over time, and that of the picture around it. Compressed
letters deviate by less than 5; letters drawn on real clips and real clips without any lie apart at these values
(docs/training-data.md)."""
LEAST_PIXELS = 40
"""Strokes with fewer pixels in one place are not reported."""


class OverlayFinder:
    """Takes some frames of one source, and says where something seems to be burned in."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = np.zeros((0, 0))
        self._squares = np.zeros((0, 0))
        self._step = 1

    def add(self, frame: np.ndarray) -> None:
        """Look at a frame: uint8 RGB (height, width, 3)."""
        grey = luminance(frame).astype(np.float32)
        if not self._count:
            self._step = math.ceil(max(grey.shape) / MAX_SIDE)
        if self._step > 1:
            height, width = (side // self._step * self._step for side in grey.shape)
            small = grey[:height, :width].reshape(height // self._step, self._step, width // self._step, self._step)
            grey = small.mean(axis=(1, 3))
        if not self._count:
            self._mean, self._squares = np.zeros(grey.shape), np.zeros(grey.shape)
        self._count += 1
        change = grey - self._mean
        self._mean += change / self._count
        self._squares += change * (grey - self._mean)

    def boxes(self) -> list[Box]:
        """Places with still strokes, largest first; none where nothing moves, since then all is still."""
        if self._count < 3:
            return []
        deviation = np.sqrt(self._squares / self._count)
        picture = self._mean > 16
        if not picture.any() or float(np.median(deviation[picture])) < MOTION:
            return []
        strokes = self._mean - ndimage.grey_opening(self._mean, size=(STROKE, STROKE))
        is_still = (strokes > CONTRAST) & (deviation < STILLNESS)
        words, _ = ndimage.label(ndimage.binary_dilation(is_still, np.ones((3, 9))))
        found = []
        for number, place in enumerate(ndimage.find_objects(words), start=1):
            pixels = int((is_still[place] & (words[place] == number)).sum())
            if pixels >= LEAST_PIXELS:
                rows, columns = place
                box = Box(
                    left=int(columns.start) * self._step,
                    top=int(rows.start) * self._step,
                    width=int(columns.stop - columns.start) * self._step,
                    height=int(rows.stop - rows.start) * self._step,
                )
                found.append((pixels, box))
        return [box for _, box in sorted(found, key=lambda pair: (-pair[0], pair[1].top, pair[1].left))]
