"""What every check needs of a frame, fast enough for every frame of a large video. Torch-free."""

import numpy as np
from PIL import Image

__all__ = ["area_mean", "brightest", "luminance"]


def luminance(frame: np.ndarray) -> np.ndarray:
    """Grey levels (BT.601) of a frame.

    Args:
        frame: uint8 RGB (height, width, 3).

    Returns:
        uint8 (height, width).
    """
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).convert("L"))


def brightest(frame: np.ndarray) -> np.ndarray:
    """The largest of the three channels: uint8 (height, width)."""
    # twenty times as fast as a maximum along the last axis
    return np.asarray(np.maximum(np.maximum(frame[..., 0], frame[..., 1]), frame[..., 2]))


def area_mean(grey: np.ndarray, side: int) -> np.ndarray:
    """Mean over ``side`` x ``side`` areas, equal but for rounding to whole pixels.

    A matrix product would do, but waits for its threads where other programs use the processor.

    Returns:
        float32 (side, side).
    """
    return np.asarray(Image.fromarray(grey).convert("F").resize((side, side), Image.Resampling.BOX))
