"""Pictures inside the report: frame strips and moving clips as WebP in ``data:`` addresses, one file and no scripts."""

import base64
from io import BytesIO

import numpy as np
from PIL import Image

__all__ = ["first_frame", "moving", "strip"]

QUALITY = 88
"""Speckle survives; a strip of eight frames is about 20 kB."""


def strip(clip: np.ndarray, *, columns: int) -> str:
    """Frames side by side, evenly spaced from first to last.

    Args:
        clip: uint8 RGB (frames, height, width, 3).
    """
    shown = np.linspace(0, len(clip) - 1, columns).round().astype(int)
    return _address(Image.fromarray(np.concatenate(list(clip[shown]), axis=1)))


def first_frame(clip: np.ndarray) -> str:
    """For readers who asked their system for less motion."""
    return _address(Image.fromarray(clip[0]))


def moving(clip: np.ndarray, *, fps: float) -> str:
    """The clip, played forever."""
    frames = [Image.fromarray(frame) for frame in clip]
    return _address(frames[0], save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)


def _address(image: Image.Image, **options: object) -> str:
    buffer = BytesIO()
    image.save(buffer, format="WEBP", quality=QUALITY, method=4, **options)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
