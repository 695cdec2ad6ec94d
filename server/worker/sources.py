"""Decodes what clips are made from, in the worker: where a file crashes the decoder, it costs an attempt."""

from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from medsora.errors import MedsoraError
from medsora.given import has_transparent_pixels
from medsora.video_io import rgb_of
from server.files.store import FileStore
from server.jobs.repository import JobRecord
from server.sources.media import PICTURES, MediaError, open_video, read_kind, video_stream
from server.sources.repository import SourceRecord

__all__ = ["SourceError", "load_source", "read_frames"]

Frames = np.ndarray[Any, np.dtype[np.uint8]]
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")


class SourceError(MedsoraError):
    """What the clip is to be made from is gone, or cannot be decoded."""


def load_source(store: FileStore, source: SourceRecord | None, job: JobRecord) -> Frames:
    """Frames of the source of a job, uint8 RGB ``(frames, height, width, 3)``.

    Raises:
        SourceError: They cannot be had.
    """
    what = "input_reference" if job.source_kind == "reference" else "video"
    if source is None:
        raise SourceError(f"{what}: is gone")
    try:
        with store.local(source.id) as path:
            return read_frames(path, width=job.width, height=job.height, num_frames=source.num_frames)
    except FileNotFoundError:
        raise SourceError(f"{what}: is gone") from None
    except MediaError as error:
        raise SourceError(f"{what}: {error}") from error


def read_frames(path: Path, *, width: int, height: int, num_frames: int) -> Frames:
    """Decode all frames of a picture or video.

    Args:
        num_frames: As many must be there; no more are decoded.

    Returns:
        uint8 RGB (num_frames, height, width, 3).

    Raises:
        MediaError: It is damaged, or of another size or length.
    """
    kind = read_kind(path)
    frames = [_read_picture(path)] if kind in PICTURES else _read_video(path, kind, (width, height), num_frames)
    for frame in frames:
        if frame.shape != (height, width, 3):
            raise MediaError(f"has a frame of {frame.shape[1]}x{frame.shape[0]}, not {width}x{height}")
    if len(frames) != num_frames:
        raise MediaError(f"has {len(frames)} frames that can be decoded, not {num_frames}")
    return np.stack(frames)


def _read_picture(path: Path) -> Frames:
    try:
        with Image.open(path, formats=[kind.upper() for kind in PICTURES]) as image:
            if image.mode not in _MODES:
                raise MediaError(f"has pixels of mode {image.mode}; allowed: 8 bits a channel")
            if has_transparent_pixels(image):
                raise MediaError("has transparent pixels; allowed: opaque ones")
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"is a damaged picture: {str(error).replace(str(path), 'file')[:100]}") from None


def _read_video(path: Path, kind: str, size: tuple[int, int], num_frames: int) -> list[Frames]:
    frames: list[Frames] = []
    try:
        with open_video(path, kind) as source:
            stream = video_stream(source)
            stream.codec_context.thread_count = 1
            for frame in source.decode(stream):
                if (frame.width, frame.height) != size:  # before it is converted: a frame may grow midway
                    raise MediaError(f"has a frame of {frame.width}x{frame.height}, not {size[0]}x{size[1]}")
                if len(frames) == num_frames:
                    raise MediaError(f"has more than {num_frames} frames")
                frames.append(rgb_of(frame))
    except av.FFmpegError as error:
        raise MediaError(f"is a damaged video: {error.strerror or 'it cannot be decoded'}") from None
    return frames
