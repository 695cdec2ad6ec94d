from __future__ import annotations

import errno
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medsora.errors import VideoError
from medsora.video_io import (
    ffv1_writer,
    from_uint8,
    mp4_writer,
    probe_video,
    read_video,
    to_uint8,
    write_contact_sheet,
    write_ffv1,
    write_mp4,
)

Writer = Callable[..., None]
WRITERS = [pytest.param(write_mp4, ".mp4", id="mp4"), pytest.param(write_ffv1, ".mkv", id="ffv1")]


def noise(num_frames: int = 6, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def ramp() -> np.ndarray:
    """Every grey level once, as columns."""
    return np.broadcast_to(np.arange(256, dtype=np.uint8)[None, None, :, None], (4, 32, 256, 3)).copy()


def test_every_grey_level_survives_the_mp4(tmp_path: Path) -> None:
    write_mp4(tmp_path / "ramp.mp4", ramp(), fps=8, crf=1)
    shown, _ = read_video(tmp_path / "ramp.mp4")
    error = shown.astype(int) - ramp()
    assert np.abs(error).max() <= 1
    assert abs(error.mean()) < 0.1  # rounded, not cut off
    assert shown.min() == 0
    assert shown.max() == 255  # a second squeeze into 16-235 would end at 16 and 235


def test_default_quality_keeps_flat_areas_within_two_levels(tmp_path: Path) -> None:
    levels = [0, 16, 128, 235, 255]
    clip = np.concatenate([np.full((4, 32, 32, 3), level, np.uint8) for level in levels], axis=2)
    write_mp4(tmp_path / "flat.mp4", clip, fps=8)
    shown, _ = read_video(tmp_path / "flat.mp4")
    assert np.abs(shown.astype(int) - clip).max() <= 2


def test_the_stored_luma_is_limited_range(tmp_path: Path) -> None:
    write_mp4(tmp_path / "ramp.mp4", ramp(), fps=8, crf=1)
    with av.open(str(tmp_path / "ramp.mp4")) as source:
        luma = next(source.decode(video=0)).to_ndarray()[:32]
    assert (luma.min(), luma.max()) == (16, 235)


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 40), (30, 60, 220)])
def test_colours_are_right_by_bt709(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    clip = np.broadcast_to(np.array(colour, np.uint8), (4, 32, 32, 3))
    write_mp4(tmp_path / "patch.mp4", clip, fps=8, crf=1)
    with av.open(str(tmp_path / "patch.mp4")) as source:
        planes = next(source.decode(video=0)).to_ndarray()
    red, green, blue = (level / 255 for level in colour)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = (16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748)
    # planar layout of one 32x32 frame: 32 rows of luma, then 8 rows each of the two chroma planes
    stored = (planes[:32].mean(), planes[32:40].mean(), planes[40:].mean())
    assert stored == pytest.approx(expected, abs=1.0)
    shown, _ = read_video(tmp_path / "patch.mp4")
    assert np.abs(shown.astype(int) - clip).max() <= 3


def test_mp4_says_how_its_colours_are_meant(tmp_path: Path) -> None:
    write_mp4(tmp_path / "clip.mp4", noise(), fps=8)
    with av.open(str(tmp_path / "clip.mp4")) as source:
        context = source.streams.video[0].codec_context
        tags = (context.color_range, context.colorspace, context.color_primaries, context.color_trc)
        assert context.pix_fmt == "yuv420p"
    assert [int(tag) for tag in tags] == [1, 1, 1, 1]  # limited ("tv") range; BT.709 thrice


def boxes(data: bytes) -> Iterator[str]:
    """Names of the top-level boxes of an MP4."""
    offset = 0
    while offset < len(data):
        size, name = struct.unpack_from(">I4s", data, offset)
        yield name.decode()
        offset += size or len(data)


def test_mp4_index_comes_before_the_pictures(tmp_path: Path) -> None:
    write_mp4(tmp_path / "clip.mp4", noise(), fps=8)
    names = list(boxes((tmp_path / "clip.mp4").read_bytes()))
    assert names.index("moov") < names.index("mdat")


@pytest.mark.parametrize("shape", [(5, 33, 47), (1, 1, 1), (3, 64, 64)])
def test_ffv1_keeps_every_bit(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    clip = noise(*shape)
    write_ffv1(tmp_path / "clip.mkv", clip, fps=8)
    shown, fps = read_video(tmp_path / "clip.mkv")
    assert fps == 8
    np.testing.assert_array_equal(shown, clip)


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_same_input_gives_same_bytes(tmp_path: Path, write: Writer, suffix: str) -> None:
    for name in ("one", "two"):
        write(tmp_path / f"{name}{suffix}", noise(), fps=8, metadata={"title": "t"})
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


@pytest.mark.parametrize("writer", [mp4_writer, ffv1_writer])
def test_no_threads_are_started_to_write_a_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Callable[..., Any]
) -> None:
    held = []  # a frame's threads end with it

    def hold(rgb: np.ndarray) -> av.VideoFrame:
        held.append(av.VideoFrame.from_ndarray(rgb, format="rgb24"))
        return held[-1]

    monkeypatch.setattr("medsora.video_io._rgb_frame", hold)
    before = psutil.Process().num_threads()
    with writer(tmp_path / "clip.video", size=(64, 64), fps=8) as write:
        write(noise())
        assert psutil.Process().num_threads() <= before
    assert len(held) == 6


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
@pytest.mark.parametrize(
    "metadata", [{"title": "Lung", "comment": '{"seed": 7}'}, {"comment": "c", "medsora_seed": "7"}]
)
def test_metadata_comes_back(tmp_path: Path, write: Writer, suffix: str, metadata: dict[str, str]) -> None:
    path = tmp_path / f"clip{suffix}"
    write(path, noise(), fps=8, metadata=metadata)
    assert probe_video(path).metadata == metadata


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
@pytest.mark.parametrize("fps", [8.0, 29.97, 30000 / 1001, 0.5])
@pytest.mark.parametrize("num_frames", [1, 6])
def test_probe_tells_the_truth(tmp_path: Path, write: Writer, suffix: str, fps: float, num_frames: int) -> None:
    path = tmp_path / f"clip{suffix}"
    write(path, noise(num_frames, 32, 48), fps=fps)
    info = probe_video(path)
    assert (info.num_frames, info.width, info.height) == (num_frames, 48, 32)
    assert info.fps == pytest.approx(fps, rel=1e-3)
    assert info.codec == {".mp4": "h264", ".mkv": "ffv1"}[suffix]


def test_higher_crf_makes_smaller_files(tmp_path: Path) -> None:
    sizes = []
    for crf in (10, 30):
        write_mp4(tmp_path / "clip.mp4", noise(), fps=8, crf=crf)
        sizes.append((tmp_path / "clip.mp4").stat().st_size)
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize(("height", "width"), [(33, 32), (32, 33)])
def test_odd_sizes_are_refused_for_mp4(tmp_path: Path, height: int, width: int) -> None:
    with pytest.raises(VideoError, match=f"even sizes, got {width}x{height}"):
        write_mp4(tmp_path / "clip.mp4", noise(2, height, width), fps=8)
    assert not (tmp_path / "clip.mp4").exists()


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
@pytest.mark.parametrize(
    ("frames", "options"),
    [
        (noise().astype(np.float32), {}),
        (noise()[0], {}),
        (noise()[:0], {}),
        (noise()[..., :2], {}),
        (noise(), {"fps": 0.0}),
        (noise(), {"fps": float("nan")}),
        (noise(), {"fps": 1e-4}),
        (noise(), {"metadata": {"Title": "x"}}),
        (noise(), {"metadata": {"two words": "x"}}),
        (noise(), {"metadata": {"encoder": "x"}}),
        (noise(), {"metadata": {"title": ""}}),
        (noise(), {"metadata": {"title": "a\0b"}}),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(
    tmp_path: Path, write: Writer, suffix: str, frames: np.ndarray, options: dict[str, object]
) -> None:
    path = tmp_path / f"clip{suffix}"
    with pytest.raises(VideoError, match=path.name):
        write(path, frames, **{"fps": 8.0, **options})
    assert not path.exists()


@pytest.mark.parametrize("options", [{"crf": 0}, {"crf": 52}, {"preset": "no-such-preset"}])
def test_bad_encoder_settings_are_refused(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(VideoError, match=r"clip\.mp4"):
        write_mp4(tmp_path / "clip.mp4", noise(), fps=8, **options)  # type: ignore[arg-type]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    for read in (read_video, probe_video):
        with pytest.raises(VideoError, match=r"text\.mp4"):
            read(tmp_path / "text.mp4")
        with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
            read(tmp_path / "none.mp4")


def test_a_sound_file_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mkv"), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.raises(VideoError, match="holds no video"):
        read_video(tmp_path / "sound.mkv")


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.95])
def test_a_cut_off_mp4_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "clip.mp4"
    write_mp4(path, noise(), fps=8)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(VideoError, match=r"clip\.mp4"):
        read_video(path)


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_missing_folder_is_an_os_error(tmp_path: Path, write: Writer, suffix: str) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / f"clip{suffix}", noise(), fps=8)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_full_disk_is_an_os_error(write: Writer, suffix: str) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        write(Path("/dev/full"), noise(), fps=8)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
@pytest.mark.parametrize("missing", [1, 300, 5000])
def test_a_disk_that_fills_up_late_is_noticed(tmp_path: Path, write: Writer, suffix: str, missing: int) -> None:
    """The last bytes are written when the file is closed, and MP4 is then written a second time."""
    path = tmp_path / f"clip{suffix}"
    write(path, noise(), fps=8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size - missing, limits[1]))
        with pytest.raises(OSError, match="File too large") as caught:
            write(path, noise(), fps=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG


def test_every_level_survives_the_tensor_round_trip() -> None:
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(2, 3, 16, 16, 3)
    video = from_uint8(frames)
    assert video.shape == (2, 3, 3, 16, 16)
    assert (video.min().item(), video.max().item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(video), frames)


@given(level=st.floats(min_value=-2, max_value=2, width=32))
def test_to_uint8_rounds_to_the_nearest_level_and_clips(level: float) -> None:
    pixel = to_uint8(torch.full((1, 1, 1, 1, 1), level)).item()
    wanted = (min(max(level, -1.0), 1.0) + 1.0) * 127.5
    assert abs(pixel - wanted) <= 0.5 + 1e-4


def test_to_uint8_takes_half_precision() -> None:
    video = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.bfloat16).reshape(1, 1, 3, 1, 1)
    assert to_uint8(video).flatten().tolist() == [0, 128, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_to_uint8_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(VideoError, match="not finite"):
        to_uint8(torch.full((1, 3, 1, 2, 2), bad))


@pytest.mark.parametrize("labels", [None, ["first", "second"]])
def test_contact_sheet_shows_first_and_last_frames(tmp_path: Path, labels: list[str] | None) -> None:
    clips = [
        np.repeat(np.arange(16, dtype=np.uint8), 32 * 24 * 3).reshape(16, 32, 24, 3) + offset for offset in (0, 100)
    ]
    write_contact_sheet(tmp_path / "sheet.png", clips, columns=4, labels=labels)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    text = 16 if labels else 0
    assert sheet.shape == (2 * (text + 32) + 2, 4 * 24 + 3 * 2, 3)
    middles = sheet[text + 16 :: text + 34, 12::26, 0]
    assert middles.tolist() == [[0, 5, 10, 15], [100, 105, 110, 115]]


def test_contact_sheet_refuses_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    for clips, columns, labels in (
        ([], 4, None),
        ([noise()], 0, None),
        ([noise(), noise(2, 8, 8)], 4, None),
        ([noise()], 4, ["a", "b"]),
    ):
        with pytest.raises(VideoError, match=r"sheet\.png"):
            write_contact_sheet(path, clips, columns=columns, labels=labels)
    assert not path.exists()


def test_import_loads_no_torch() -> None:
    code = "import sys, medsora.video_io; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
