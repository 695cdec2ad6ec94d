"""The picture or video that a clip begins with, read from a file of one's own and checked against the clip.

Nothing is scaled, cropped, turned or resampled. What comes from others the server reads with bounds of its own
(``server/sources/media.py``).
"""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from medsora.errors import RequestError, VideoError
from medsora.manifest import Limits
from medsora.video_io import Frames, iterate_video

__all__ = ["has_transparent_pixels", "read_given_frames"]

_PICTURES = ("PNG", "JPEG", "WEBP")
_ORIENTATION = 0x0112  # Exif


def read_given_frames(path: Path, *, size: tuple[int, int], most: int, limits: Limits) -> Frames:
    """Frames of a picture or video.

    Args:
        size: Width and height in pixels that they must have.
        most: A longer video is refused, without reading all of it.
        limits: Of the checkpoint, whose rate a video must have.

    Returns:
        uint8 RGB (frames, height, width, 3); of a picture one.

    Raises:
        RequestError: It is of another size, rate or length.
        VideoError: It is no picture or video, or damaged.
        OSError: It cannot be opened.
    """
    picture = _read_picture(path)
    if picture is not None:
        _check_size(picture, size)
        return picture[None]
    frames: list[Frames] = []
    for frame, fps in iterate_video(path):
        assert frame is not None  # all were wanted
        _check_size(frame, size)
        if abs(fps - limits.fps) > 0.01 * limits.fps:
            raise RequestError("from", f"has {fps:g} frames a second", [f"{limits.fps:g}, the rate of the checkpoint"])
        if len(frames) == most:
            problem = f"has more than {most} frames, which leave nothing to make of a clip of {most + 1}"
            raise RequestError("from", problem, [f"1 to {most} frames; a longer clip where the checkpoint makes one"])
        frames.append(frame)
    return np.stack(frames)


def has_transparent_pixels(image: Image.Image) -> bool:
    """Whether a pixel of a picture is not wholly opaque; decodes it where it might be."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return False
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return bool(lowest != 255)


def _check_size(frame: Frames, size: tuple[int, int]) -> None:
    height, width, _ = frame.shape
    if (width, height) != size:
        raise RequestError("from", f"has {width}x{height} pixels", [f"{size[0]}x{size[1]}, as the clip"])


def _read_picture(path: Path) -> Frames | None:
    """A picture; None: the file is none, and perhaps a video."""
    try:
        image = Image.open(path, formats=_PICTURES)
    except UnidentifiedImageError:
        return None
    try:
        with image:
            if getattr(image, "n_frames", 1) > 1:
                raise VideoError(f"{path}: is an animation; give it as MP4 or WebM")
            if image.getexif().get(_ORIENTATION, 1) != 1:
                raise VideoError(f"{path}: is stored turned or mirrored, as its Exif data say; store it upright")
            if has_transparent_pixels(image):
                raise VideoError(f"{path}: has transparent pixels")
            return np.asarray(image.convert("RGB"))
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path}: is a damaged picture: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise VideoError(f"{path}: is a damaged picture: {error}") from error
