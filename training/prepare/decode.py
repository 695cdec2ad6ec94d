"""Frames of an item one by one, never all at once, with their numbers. Torch-free."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from medsora.errors import VideoError
from medsora.video_io import iterate_video
from training.errors import DataError
from training.prepare.dicom import dicom_frames
from training.prepare.source import Item

__all__ = ["Frame", "decode"]

OnBadFrame = Callable[[str, str], None]


@dataclass(frozen=True, eq=False)
class Frame:
    """A decoded frame."""

    number: int
    """In the source, from 0; a missing number is a frame that is not there or cannot be read."""
    pixels: np.ndarray
    """uint8 RGB (height, width, 3)."""
    fps: float | None
    """As the file says."""


def decode(item: Item, on_bad_frame: OnBadFrame) -> Iterator[Frame]:
    """Decode the frames that lie in a segment of ``item``.

    Args:
        on_bad_frame: Gets name and reason of each image of a frame folder that cannot be read.

    Raises:
        DataError: The item cannot be decoded to its end, or its frames are of different sizes.
    """
    size: tuple[int, ...] | None = None
    for frame in _frames(item, on_bad_frame):
        if size is None:
            size = frame.pixels.shape
        elif frame.pixels.shape != size:
            raise DataError(
                f"frame {frame.number} is {frame.pixels.shape[1]}x{frame.pixels.shape[0]} pixels, "
                f"the frames before it are {size[1]}x{size[0]}"
            )
        yield frame


def _frames(item: Item, on_bad_frame: OnBadFrame) -> Iterator[Frame]:
    if item.kind == "frames":
        yield from _images(item, on_bad_frame)
    elif item.kind == "dicom":
        for number, pixels in enumerate(dicom_frames(item.paths[0])):
            if _is_wanted(item, number):
                yield Frame(number, pixels, None)
    else:
        yield from _video(item)


def _is_wanted(item: Item, number: int) -> bool:
    return any(
        segment.first <= number and (segment.last is None or number <= segment.last) for segment in item.segments
    )


def _video(item: Item) -> Iterator[Frame]:
    path = item.paths[0]
    try:
        for number, (pixels, fps) in enumerate(iterate_video(path, wants=lambda number: _is_wanted(item, number))):
            if pixels is not None:
                yield Frame(number, pixels, fps)
    except VideoError as error:
        raise DataError(str(error).removeprefix(f"{path}: ")) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error


def _images(item: Item, on_bad_frame: OnBadFrame) -> Iterator[Frame]:
    for number, path in zip(item.numbers, item.paths, strict=True):
        if not _is_wanted(item, number):
            continue
        try:
            yield Frame(number, _read_image(path), None)
        except DataError as error:
            on_bad_frame(f"{item.name}/{path.name}", str(error))


def _read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise DataError("is no image that can be read") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot be read: {error}") from error
