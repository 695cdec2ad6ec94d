"""The frames of an item that go into the cache, and their way into its size. Both passes use the same. Torch-free."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from training.errors import DataError
from training.prepare.config import Box, PrepareConfig
from training.prepare.decode import Frame, OnBadFrame, decode
from training.prepare.pixels import brightest
from training.prepare.source import Item

__all__ = ["KeptFrame", "fit_frame", "frame_step", "is_black", "kept_frames", "paint_black"]

BLACK_LEVEL, BLACK_SHARE = 16, 0.999


@dataclass(frozen=True, eq=False)
class KeptFrame:
    """A frame of a clip."""

    segment: int
    """Index into the item's segments."""
    frame: Frame
    """With the configured masks and crop applied."""
    is_scene_start: bool
    """Frames are missing before it, or the source says that a scene begins here."""


@dataclass
class Dropped:
    """Counts what :func:`kept_frames` left out."""

    black: int = 0


def is_black(pixels: np.ndarray) -> bool:
    """Whether a frame shows nothing, as data sets do with views from outside of the body."""
    return bool((brightest(pixels) <= BLACK_LEVEL).mean() >= BLACK_SHARE)


def frame_step(fps: float | None, max_fps: float | None) -> int:
    """Every how many frames one is kept.

    >>> frame_step(60.0, 15.0), frame_step(25.0, None), frame_step(10.0, 15.0)
    (4, 1, 1)
    """
    return 1 if fps is None or max_fps is None else max(1, round(fps / max_fps))


def kept_frames(item: Item, config: PrepareConfig, on_bad_frame: OnBadFrame, dropped: Dropped) -> Iterator[KeptFrame]:
    """Decode an item and keep what its clips are made of.

    Raises:
        DataError: The item cannot be decoded, or a mask or crop does not lie in its frames.
    """
    expected: dict[int, int] = {}
    pending_cuts = {
        index: [] if config.cuts in ("detect", "none") else sorted(segment.cuts)
        for index, segment in enumerate(item.segments)
    }
    for frame in decode(item, on_bad_frame):
        index = _segment_of(item, frame.number)
        step = frame_step(item.fps or frame.fps or config.fps, config.max_fps)
        first = item.segments[index].first
        if (frame.number - first) % step:
            continue
        pixels = _cropped(paint_black(frame.pixels, config.masks), config.crop)
        if config.black_frames == "drop" and is_black(pixels):
            dropped.black += 1
            continue
        is_start = False
        while pending_cuts[index] and pending_cuts[index][0] <= frame.number:
            pending_cuts[index].pop(0)
            is_start = True
        is_start |= index in expected and frame.number != expected[index]
        is_first = index not in expected
        expected[index] = frame.number + step
        yield KeptFrame(index, Frame(frame.number, pixels, frame.fps), is_start and not is_first)


def _segment_of(item: Item, number: int) -> int:
    for index, segment in enumerate(item.segments):
        if segment.first <= number and (segment.last is None or number <= segment.last):
            return index
    raise AssertionError(f"frame {number} of {item.name} lies in no segment")  # decode gives no other


def paint_black(pixels: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """Copy of a frame with rectangles in black; parts of them that lie outside do not matter."""
    if not boxes:
        return pixels
    painted = pixels.copy()
    for box in boxes:
        painted[box.top : box.bottom, box.left : box.right] = 0
    return painted


def _cropped(pixels: np.ndarray, box: Box | None) -> np.ndarray:
    if box is None:
        return pixels
    height, width = pixels.shape[:2]
    if box.right > width or box.bottom > height:
        raise DataError(f"crop {box} does not lie in its frames of {width}x{height} pixels")
    return pixels[box.top : box.bottom, box.left : box.right]


def fit_frame(pixels: np.ndarray, picture: Box | None, config: PrepareConfig) -> np.ndarray:
    """Bring a frame to the cache's size. A frame that has it already stays as it is, to the bit.

    Args:
        picture: Part that is used, e.g. without black borders.

    Returns:
        uint8 (config.height, config.width, 3).
    """
    if picture is not None:
        pixels = pixels[picture.top : picture.bottom, picture.left : picture.right]
    height, width = pixels.shape[:2]
    if (height, width) == (config.height, config.width):
        return np.ascontiguousarray(pixels)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    target = (config.width, config.height)
    if config.fit == "stretch":
        return np.asarray(image.resize(target, Image.Resampling.BICUBIC))
    if config.fit == "crop":
        scale = max(config.width / width, config.height / height)
        used_width, used_height = config.width / scale, config.height / scale
        left, top = (width - used_width) / 2, (height - used_height) / 2
        box = (left, top, left + used_width, top + used_height)
        return np.asarray(image.resize(target, Image.Resampling.BICUBIC, box=box))
    scale = min(config.width / width, config.height / height)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    padded = np.zeros((config.height, config.width, 3), dtype=np.uint8)
    left, top = (config.width - inner[0]) // 2, (config.height - inner[1]) // 2
    padded[top : top + inner[1], left : left + inner[0]] = np.asarray(image.resize(inner, Image.Resampling.BICUBIC))
    return padded
