"""Pictures and videos from outside: what they say of themselves, read with bounds.

The API process opens none of them: :func:`inspect` runs this module as a child with little memory and time, which reads
headers and counts packets, and decodes nothing. Frames are decoded by the worker (``server/worker/sources.py``).
"""

import json
import resource
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.children import limit_self, plain_environment

__all__ = ["MEDIA_TYPES", "Media", "MediaError", "inspect", "kind_of_media", "open_video", "read_kind", "video_stream"]

MAX_PIXELS = 4096 * 4096
"""Of a frame; no model comes near it."""
_ORIENTATION = 0x0112  # Exif
_LIMIT_S = 20
_children = threading.BoundedSemaphore(4)
"""Children of this process that run at once: uploads beyond them wait."""
_LIMIT_BYTES = 2 * 2**30
_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "ffv1", "mjpeg", "mpeg4", "png")


MEDIA_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "mp4": "video/mp4",
    "matroska": "video/webm",
}
"""Kind of media -> its type. MP4 is QuickTime too, Matroska is WebM too."""
PICTURES = ("png", "jpeg", "webp")


def kind_of_media(head: bytes) -> str | None:
    """Kind of media by the first 16 bytes of a file, or None; names and types that a client gives are not trusted."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp":
        return "mp4"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    return None


@dataclass(frozen=True, kw_only=True)
class Media:
    """What a picture or video says of itself."""

    kind: str
    """Of :data:`MEDIA_TYPES`."""
    width: int
    height: int
    num_frames: int
    fps: float | None
    """Frames a second; None: a picture."""


class MediaError(Exception):
    """A picture or video that cannot be used; the message says why, without a name before it."""


def inspect(path: Path, *, max_frames: int) -> Media:
    """What a file says of itself, read by a child process.

    Args:
        max_frames: More than these are refused, and not counted further.

    Raises:
        MediaError: It is no picture or video that is read here, damaged, or too large.
        FileNotFoundError: It is gone.
    """
    path.stat()  # for what the child would not tell apart
    command = [sys.executable, "-m", "server.sources.media", str(path), str(max_frames)]
    options: dict[str, Any] = {"capture_output": True, "stdin": subprocess.DEVNULL, "env": plain_environment()}
    try:
        with _children:
            done = subprocess.run(command, timeout=_LIMIT_S, check=False, **options)
    except subprocess.TimeoutExpired:
        raise MediaError("takes too long to read") from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:  # out of memory or time, or a crash in a decoder
        raise MediaError("is damaged, or takes too much memory to read") from None
    if "problem" in answer:
        raise MediaError(answer["problem"])
    return Media(**answer)


def read_kind(path: Path) -> str:
    """Kind of media of a file.

    Raises:
        MediaError: It is of none.
    """
    with path.open("rb") as file:
        kind = kind_of_media(file.read(16))
    if kind is None:
        raise MediaError("is no picture or video that is read here")
    return kind


def _inspect_picture(path: Path, kind: str) -> Media:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # this process decodes nothing, and judges the size itself
    if kind == "webp":
        width, height = _webp_size(path)
    else:
        try:
            with Image.open(path, formats=[kind.upper()]) as image:
                width, height = image.size
                if getattr(image, "n_frames", 1) > 1:
                    raise MediaError("is an animation; send it as MP4 or WebM")
                # of a PNG this would decode all of it
                if kind == "jpeg" and image.getexif().get(_ORIENTATION, 1) != 1:
                    raise MediaError("is stored turned or mirrored (its Exif orientation says so); store it upright")
        except (OSError, ValueError, SyntaxError) as error:
            raise MediaError(f"is a damaged picture: {str(error).replace(str(path), 'file')[:100]}") from None
    return Media(kind=kind, width=width, height=height, num_frames=1, fps=None)


def _webp_size(path: Path) -> tuple[int, int]:
    """From the header: the library allocates the whole canvas to tell it."""
    with path.open("rb") as file:
        head = file.read(30)
    chunk, body = head[12:16], head[20:]
    if len(head) < 30:
        raise MediaError("is a damaged picture: cut off")
    if chunk == b"VP8X":
        if body[0] & 0x02:
            raise MediaError("is an animation; send it as MP4 or WebM")
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise MediaError("is a damaged picture")


def open_video(path: Path, kind: str) -> Any:
    """PyAV's container of a file of that kind, and of nothing else."""
    import av

    # The format is named, so that no playlist is taken for a video, and nothing but this file is opened.
    return av.open(str(path), format=kind, options={"protocol_whitelist": "file"})


def video_stream(source: Any) -> Any:
    """The one video stream of a container.

    Raises:
        MediaError: There is another number of them, or it is coded in a way that is not read here.
    """
    if len(source.streams.video) != 1:
        raise MediaError(f"has {len(source.streams.video)} video streams; allowed: one")
    stream = source.streams.video[0]
    name = stream.codec_context.name
    if name not in _CODECS:
        raise MediaError(f"is coded as {name[:40]}; allowed: {', '.join(_CODECS)}")
    if not 0 < stream.codec_context.width * stream.codec_context.height <= MAX_PIXELS:
        raise MediaError(f"has frames of {stream.codec_context.width}x{stream.codec_context.height}")
    return stream


def _inspect_video(path: Path, kind: str, max_frames: int) -> Media:
    import av

    try:
        with open_video(path, kind) as source:
            stream = video_stream(source)
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise MediaError("does not say its frame rate")
            count = 0
            for packet in source.demux(stream):
                count += packet.size > 0
                if count > max_frames:
                    raise MediaError(f"has more than the {max_frames} frames that can be used")
            if not count:
                raise MediaError("has no frames")
            context = stream.codec_context
            size = {"width": context.width, "height": context.height}
            return Media(kind=kind, num_frames=count, fps=float(rate), **size)
    except av.FFmpegError as error:
        raise MediaError(f"is a damaged video: {error.strerror or 'it cannot be read'}") from None


def _main(path: Path, max_frames: int) -> None:
    limit_self(size_bytes=_LIMIT_BYTES, cpu_s=_LIMIT_S)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        kind = read_kind(path)
        found = _inspect_picture(path, kind) if kind in PICTURES else _inspect_video(path, kind, max_frames)
        if found.width * found.height > MAX_PIXELS:
            raise MediaError(f"has {found.width}x{found.height} pixels, more than are read")
        answer: dict[str, Any] = vars(found)
    except MediaError as error:
        answer = {"problem": str(error)}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
