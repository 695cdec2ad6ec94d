"""Video files and pixel ranges: the one place that knows [-1, 1] from uint8, and RGB from YUV.

MP4 (H.264, yuv420p) is for viewing and loses a little; FFV1 in Matroska keeps every bit. Both writers give
the same bytes for the same input. They write straight to the path they are given: writing to a temporary
name and renaming is the caller's part. Torch is loaded by the two tensor functions only.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from PIL import Image, ImageDraw, ImageFont

from medsora.errors import VideoError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "VideoInfo",
    "ffv1_writer",
    "fragmented_mp4_writer",
    "from_uint8",
    "iterate_video",
    "mp4_writer",
    "probe_video",
    "read_video",
    "rgb_of",
    "to_uint8",
    "write_contact_sheet",
    "write_ffv1",
    "write_mp4",
]

Frames = np.ndarray[Any, np.dtype[np.uint8]]

# Without these flags swscale rounds down: half a grey level darker on average, and coarser at colour edges.
_EXACT = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
# Else swscale starts one for every processor, for each clip, and small frames are only the slower for it.
_SCALER_THREADS = 1
# Metadata keys that MP4 has places of its own for, which every player shows.
_MP4_KEYS = {"album", "artist", "comment", "copyright", "date", "description", "genre", "synopsis", "title"}
# What containers write about themselves; not metadata of the clip.
_CONTAINER_KEYS = {
    "compatible_brands",
    "creation_time",
    "duration",
    "encoder",
    "major_brand",
    "minor_version",
}
# Trouble of the machine, not of the video, and passed on as OSError: a full disk is no bad clip.
_MACHINE_ERRORS = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EISDIR, errno.EMFILE, errno.ENFILE,
    errno.ENOENT, errno.ENOMEM, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file says of itself."""

    num_frames: int
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    fps: float
    codec: str
    """FFmpeg's name, e.g. ``h264`` or ``ffv1``."""
    metadata: dict[str, str]
    """Lower-case keys, without those that the container writes about itself."""


def write_mp4(
    path: Path,
    frames: Frames,
    *,
    fps: float,
    crf: int = 18,
    preset: str = "veryfast",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an H.264 MP4 that every browser plays, with its index in front; see :func:`mp4_writer`.

    Args:
        frames: uint8 RGB ``(frames, height, width, 3)``; height and width even.
    """
    _check_frames(path, frames, fps)
    size = (frames.shape[2], frames.shape[1])
    with mp4_writer(path, size=size, fps=fps, crf=crf, preset=preset, metadata=metadata) as write:
        write(frames)


@contextmanager
def mp4_writer(
    path: Path,
    *,
    size: tuple[int, int],
    fps: float,
    crf: int = 18,
    preset: str = "veryfast",
    metadata: Mapping[str, str] | None = None,
) -> Iterator[Callable[[Frames], None]]:
    """Give a function that writes the next frames of an H.264 MP4, whole at the end of the block.

    The colours are converted with the BT.709 matrix to limited range, and tagged so: a player that follows
    the tags shows the grey levels it was given.

    Args:
        path: Overwritten when it exists.
        size: (width, height) of all frames, even.
        fps: Frames a second, above 0.
        crf: Quality, 1 (best) to 51. 0 would be a lossless profile that browsers do not play.
        preset: x264 preset, e.g. ``medium``: smaller files for more time.
        metadata: Lower-case keys. Players show ``title``, ``comment`` and the like; FFmpeg reads all.

    Raises:
        VideoError: The frames or a setting cannot be encoded.
        OSError: The file cannot be written (disk full, no such folder).
    """
    width, height = size
    _check_fps(path, fps)
    if height % 2 or width % 2:
        raise VideoError(
            f"{path}: H.264 with yuv420p needs even sizes, got {width}x{height}; "
            "crop or pad by one pixel, or write lossless FFV1"
        )
    if not 1 <= crf <= 51:
        raise VideoError(f"{path}: crf must be 1 to 51, got {crf}")
    tags = _check_metadata(path, metadata)
    flags = "faststart" if set(tags) <= _MP4_KEYS else "faststart+use_metadata_tags"
    # The bytes are to depend on the input alone. So bitexact, which leaves out library versions; one thread, since x264
    # decides a little differently with every number of them; and no B-frames, for which small pictures are now and
    # then planned by memory that x264 has not written (docs/experiments.md).
    container_options = {"movflags": flags, "fflags": "bitexact"}
    with (
        _file_errors(path, "written"),
        av.open(str(path), "w", "mp4", container_options=container_options) as output,
    ):
        output.metadata.update(tags)
        stream = output.add_stream(
            "libx264", rate=_rate(path, fps), options={"crf": str(crf), "preset": preset, "threads": "1", "bf": "0"}
        )
        _tag_colours(stream.codec_context, width, height)
        yield _frame_writer(output, stream, partial(_to_yuv, VideoReformatter()))  # its tables outlive a frame
        output.mux(stream.encode())


@contextmanager
def fragmented_mp4_writer(
    sink: Callable[[bytes], None],
    *,
    size: tuple[int, int],
    fps: float,
    crf: int = 18,
    preset: str = "veryfast",
    metadata: Mapping[str, str] | None = None,
) -> Iterator[Callable[[Frames], None]]:
    """Give a function that writes the next frames of an MP4 that plays while it grows: a fragment a frame.

    All frames but the last are in the sink when the function returns; that one follows with the next. Equal frames give
    equal bytes, however they are cut.

    Args:
        sink: Takes the next bytes; what it raises ends the writing.
        size: (width, height) of all frames, even.
        fps: Frames a second, above 0.
        crf: Quality, as of :func:`mp4_writer`.
        preset: x264 preset.
        metadata: Lower-case keys.

    Raises:
        VideoError: The frames or a setting cannot be encoded.
    """
    path, (width, height) = Path("stream.mp4"), size
    _check_fps(path, fps)
    if height % 2 or width % 2 or not 1 <= crf <= 51:
        raise VideoError(f"{path}: needs even sizes and a crf of 1 to 51, got {width}x{height} and {crf}")
    tags = _check_metadata(path, metadata)
    flags = "frag_every_frame+empty_moov+default_base_moof+skip_trailer"
    if not set(tags) <= _MP4_KEYS:
        flags += "+use_metadata_tags"
    # zerolatency: else the encoder keeps dozens of frames to look ahead
    options = {"crf": str(crf), "preset": preset, "tune": "zerolatency", "threads": "1", "bf": "0", "g": "16"}
    container_options = {"movflags": flags, "fflags": "bitexact", "flush_packets": "1"}
    with (
        _file_errors(path, "written"),
        av.open(_Sink(sink), "w", "mp4", container_options=container_options) as output,
    ):
        output.metadata.update(tags)
        stream = output.add_stream("libx264", rate=_rate(path, fps), options=options)
        _tag_colours(stream.codec_context, width, height)
        yield _frame_writer(output, stream, partial(_to_yuv, VideoReformatter()))  # its tables outlive a frame
        output.mux(stream.encode())


class _Sink:
    """What PyAV takes for a file that can be written and nothing else."""

    name = "stream.mp4"

    def __init__(self, sink: Callable[[bytes], None]) -> None:
        self._sink = sink

    def write(self, data: bytes) -> int:
        content = bytes(data)
        self._sink(content)
        return len(content)


def write_ffv1(path: Path, frames: Frames, *, fps: float, metadata: Mapping[str, str] | None = None) -> None:
    """Write lossless FFV1 in Matroska; see :func:`ffv1_writer`.

    Args:
        frames: uint8 RGB ``(frames, height, width, 3)``.
    """
    height, width = _check_frames(path, frames, fps)
    with ffv1_writer(path, size=(width, height), fps=fps, metadata=metadata) as write:
        write(frames)


@contextmanager
def ffv1_writer(
    path: Path, *, size: tuple[int, int], fps: float, metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[Frames], None]]:
    """Give a function that writes the next frames of lossless FFV1: :func:`read_video` gives back every bit.

    Args:
        path: Overwritten when it exists.
        size: (width, height) of all frames; any does.
        fps: Frames a second, above 0.
        metadata: Lower-case keys.

    Raises:
        VideoError: The frames or a setting cannot be encoded.
        OSError: The file cannot be written (disk full, no such folder).
    """
    _check_fps(path, fps)
    tags = _check_metadata(path, metadata)
    container_options = {"fflags": "bitexact"}
    with (
        _file_errors(path, "written"),
        av.open(str(path), "w", "matroska", container_options=container_options) as output,
    ):
        output.metadata.update(tags)
        # Version 3 with slice checksums: readers that check them notice damage.
        options = {"level": "3", "slicecrc": "1", "threads": "1"}
        stream = output.add_stream("ffv1", rate=_rate(path, fps), options=options)
        context = stream.codec_context
        context.width, context.height = size
        context.pix_fmt = "bgr0"
        yield _frame_writer(output, stream, _to_bgr0)
        output.mux(stream.encode())


def read_video(path: Path) -> tuple[Frames, float]:
    """Read all frames of a video, in RGB by the file's own colour tags (BT.601 limited where it has none).

    Returns:
        uint8 ``(frames, height, width, 3)``, and frames a second.

    Raises:
        VideoError: No video, cut off (as far as the container tells), or without a frame.
        OSError: The file cannot be opened (missing, no permission).
    """
    images, fps = [], 0.0
    for image, fps in iterate_video(path):  # noqa: B007 - the rate is the same every time
        assert image is not None  # all were wanted
        images.append(image)
    if len({image.shape for image in images}) != 1:
        raise VideoError(f"{path}: the frame size changes within the video")
    return np.stack(images), fps


def iterate_video(path: Path, wants: Callable[[int], bool] | None = None) -> Iterator[tuple[Frames | None, float]]:
    """Read a video frame by frame, as :func:`read_video` does, without ever holding more than a few.

    Args:
        wants: Says by its number whether a frame is of use; of the others None is given, which is faster.

    Returns:
        uint8 ``(height, width, 3)`` or None for every frame, and frames a second. The frame size may change.

    Raises:
        VideoError: As :func:`read_video`; a file that is cut off is noticed at its end.
        OSError: The file cannot be opened (missing, no permission).
    """
    with _file_errors(path, "read"), av.open(str(path)) as source:
        stream = _video_stream(path, source)
        fps, promised, count = _fps(path, stream), stream.frames, 0
        for frame in source.decode(stream):
            yield rgb_of(frame) if wants is None or wants(count) else None, fps
            count += 1
    if not count:
        raise VideoError(f"{path}: holds no frame that can be decoded")
    if promised and count != promised:
        raise VideoError(f"{path}: holds {count} frames where its index has {promised}")


def probe_video(path: Path) -> VideoInfo:
    """Describe a video file without decoding its frames.

    Raises:
        VideoError: No video, or damaged.
        OSError: The file cannot be opened (missing, no permission).
    """
    with _file_errors(path, "read"), av.open(str(path)) as source:
        stream = _video_stream(path, source)
        # Matroska does not say how many frames there are: count the packets.
        num_frames = stream.frames or sum(packet.size > 0 for packet in source.demux(stream))
        metadata = {key.lower(): value for key, value in source.metadata.items()}
        return VideoInfo(
            num_frames=num_frames,
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            fps=_fps(path, stream),
            codec=stream.codec_context.name,
            metadata={key: value for key, value in metadata.items() if key not in _CONTAINER_KEYS},
        )


def to_uint8(video: Tensor) -> Tensor:
    """Convert network values to pixels, rounded to the nearest level; values outside [-1, 1] are clipped.

    Args:
        video: Floats ``(b, c, f, h, w)``, -1 black, 1 white.

    Returns:
        uint8 ``(b, f, h, w, c)``.

    Raises:
        VideoError: A value is not finite: the sampler has diverged, and no picture stands for that.
    """
    import torch

    if not torch.isfinite(video).all():
        raise VideoError("the video has values that are not finite")
    return to_pixels(video)


def to_pixels(video: Tensor) -> Tensor:
    """:func:`to_uint8` without its check, which makes the host wait for the device."""
    import torch

    # float32: bfloat16 has too few digits to tell 254 from 255
    levels = ((video.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def from_uint8(frames: Tensor) -> Tensor:
    """Convert pixels to network values; :func:`to_uint8` undoes it exactly.

    Args:
        frames: uint8 ``(b, f, h, w, c)``.

    Returns:
        float32 ``(b, c, f, h, w)`` in [-1, 1].
    """
    return (frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0).contiguous()


def write_contact_sheet(
    path: Path, clips: Sequence[Frames], *, columns: int, labels: Sequence[str] | None = None
) -> None:
    """Write a PNG with one row for each clip: frames evenly spaced from its first to its last.

    Args:
        path: Overwritten when it exists.
        clips: uint8 RGB ``(frames, height, width, 3)`` each, of one picture size.
        columns: Frames shown of each clip, at least 1. A clip with fewer frames shows some twice.
        labels: One line of text for each row, written above it.

    Raises:
        VideoError: No clips, different sizes, or another number of labels than clips.
        OSError: The file cannot be written.
    """
    if not clips or columns < 1:
        raise VideoError(f"{path}: a contact sheet needs at least one clip and one column")
    sizes = {_check_frames(path, clip, 1.0) for clip in clips}
    if len(sizes) != 1:
        raise VideoError(f"{path}: clips of one contact sheet must have one picture size, got {sorted(sizes)}")
    if labels is not None and len(labels) != len(clips):
        raise VideoError(f"{path}: {len(labels)} labels for {len(clips)} clips")
    height, width = sizes.pop()
    gap, text_height = 2, 16 if labels else 0
    row_height = text_height + height + gap
    sheet = Image.new("RGB", (columns * (width + gap) - gap, len(clips) * row_height - gap))
    draw = ImageDraw.Draw(sheet)
    for row, clip in enumerate(clips):
        top = row * row_height
        if labels:
            draw.text((3, top + 1), labels[row], fill=(235, 235, 235), font=ImageFont.load_default(size=12))
        shown = np.linspace(0, len(clip) - 1, columns).round().astype(int)
        for column, index in enumerate(shown):
            sheet.paste(Image.fromarray(clip[index]), (column * (width + gap), top + text_height))
    sheet.save(path, format="PNG", optimize=True)


def _tag_colours(context: Any, width: int, height: int) -> None:
    """Size and colours of an H.264 encoder."""
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.color_range = ColorRange.MPEG
    context.colorspace = Colorspace.ITU709
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709


def _frame_writer(output: Any, stream: Any, convert: Callable[[Frames], av.VideoFrame]) -> Callable[[Frames], None]:
    """What converts the next frames and encodes them into a stream of an open container."""
    number = itertools.count()

    def write(frames: Frames) -> None:
        for rgb in frames:
            frame = convert(rgb)
            frame.pts = next(number)
            output.mux(stream.encode(frame))

    return write


def _rgb_frame(rgb: Frames) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")


def _to_yuv(converter: VideoReformatter, rgb: Frames) -> av.VideoFrame:
    return converter.reformat(
        _rgb_frame(rgb),
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        dst_color_primaries=ColorPrimaries.BT709,
        dst_color_trc=ColorTrc.BT709,
        interpolation=_EXACT,
        threads=_SCALER_THREADS,
    )


def _to_bgr0(rgb: Frames) -> av.VideoFrame:
    return _rgb_frame(rgb).reformat(format="bgr0", threads=_SCALER_THREADS)  # only moves bytes


def _check_frames(path: Path, frames: Frames, fps: float) -> tuple[int, int]:
    """Refuse what no writer can take; returns (height, width)."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise VideoError(
            f"{path}: frames must be uint8 (frames, height, width, 3) with at least one pixel, "
            f"got {frames.dtype} {frames.shape}"
        )
    _check_fps(path, fps)
    return frames.shape[1], frames.shape[2]


def _check_fps(path: Path, fps: float) -> None:
    if not (math.isfinite(fps) and fps > 0):
        raise VideoError(f"{path}: fps must be above 0, got {fps}")


def _check_metadata(path: Path, metadata: Mapping[str, str] | None) -> dict[str, str]:
    tags = dict(metadata or {})
    for key, value in tags.items():
        # Containers fold the case of keys and end texts at a zero byte: what would not come back is refused.
        if key != key.lower() or not key.replace("_", "").isalnum() or not key.isascii():
            raise VideoError(f"{path}: metadata keys are lower-case letters, digits and _, got {key!r}")
        if key in _CONTAINER_KEYS:
            raise VideoError(f"{path}: metadata key {key!r} belongs to the container")
        if not value or "\0" in value:
            raise VideoError(f"{path}: the metadata value of {key!r} is empty or has a zero byte")
    return tags


def _rate(path: Path, fps: float) -> Fraction:
    # 1001 is the denominator of the television rates, 30000/1001 and the like
    rate = Fraction(fps).limit_denominator(1001)
    if abs(float(rate) - fps) > 1e-3 * fps:
        raise VideoError(f"{path}: fps {fps} cannot be written as a fraction with a denominator up to 1001")
    return rate


def _video_stream(path: Path, source: av.container.InputContainer) -> av.VideoStream:
    if not source.streams.video:
        raise VideoError(f"{path}: holds no video")
    return source.streams.video[0]


def _fps(path: Path, stream: av.VideoStream) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise VideoError(f"{path}: does not say its frame rate")
    return float(rate)


def rgb_of(frame: av.VideoFrame) -> Frames:
    """A decoded frame as uint8 RGB ``(height, width, 3)``, by its own colour tags."""
    rgb = frame.reformat(format="rgb24", dst_color_range=ColorRange.JPEG, interpolation=_EXACT, threads=_SCALER_THREADS)
    return np.asarray(rgb.to_ndarray(), dtype=np.uint8)


@contextmanager
def _file_errors(path: Path, action: str) -> Iterator[None]:
    """Turn FFmpeg's errors into ours, or into an OSError where the machine is to blame."""
    try:
        yield
    except av.FFmpegError as error:
        if error.errno in _MACHINE_ERRORS:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise VideoError(f"{path}: cannot be {action}: {error.strerror or error}") from error
