"""Thumbnails and sheets: their sizes, which frames they show and where."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.worker.stills import read_size, sheet_layout, write_preview, write_spritesheet, write_thumbnail

METADATA = {"title": "a <b> & c", "comment": '{"seed": 1}', "description": "Synthetic."}


def clip(num_frames: int, height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Frames that are each of one grey level: ten times their number."""
    levels = np.arange(num_frames, dtype=np.uint8) * (250 // num_frames)
    return np.ascontiguousarray(np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)))


def test_thumbnail_is_the_middle_frame(tmp_path: Path) -> None:
    frames = clip(5, 16, 24)
    write_thumbnail(tmp_path / "t.webp", frames, metadata=METADATA)
    with Image.open(tmp_path / "t.webp") as image:
        assert image.size == (24, 16)
        assert abs(int(np.asarray(image.convert("L"))[8, 12]) - 100) <= 2
        assert "a &lt;b&gt; &amp; c" in image.info["xmp"].decode()


def test_large_frames_are_scaled_down_in_proportion(tmp_path: Path) -> None:
    write_thumbnail(tmp_path / "t.webp", clip(2, 400, 1024), metadata=METADATA)
    assert read_size(tmp_path / "t.webp") == (512, 200)
    write_spritesheet(tmp_path / "s.jpg", clip(2, 400, 1024), metadata=METADATA)
    assert read_size(tmp_path / "s.jpg") == (512, 100)


def test_sheet_shows_the_frames_row_by_row(tmp_path: Path) -> None:
    write_spritesheet(tmp_path / "s.jpg", clip(5, 16, 24), metadata=METADATA)
    with Image.open(tmp_path / "s.jpg") as image:
        pixels = np.asarray(image.convert("L")).astype(int)
    assert pixels.shape == (32, 72)
    centres = [[pixels[row * 16 + 8, column * 24 + 12] for column in range(3)] for row in range(2)]
    assert np.abs(np.array(centres) - [[0, 50, 100], [150, 200, 0]]).max() <= 2


@pytest.mark.parametrize(("num_frames", "fps", "shown"), [(5, 8.0, 5), (100, 30.0, 64)])
def test_preview_moves_in_the_time_of_the_clip(tmp_path: Path, num_frames: int, fps: float, shown: int) -> None:
    bright = np.arange(num_frames) % 2 == 1  # each frame differs from the one before, or they would be merged
    frames = np.where(bright[:, None, None, None], 200, 20) * np.ones((1, 16, 24, 3))
    write_preview(tmp_path / "p.webp", frames.astype(np.uint8), fps=fps, metadata=METADATA)
    shown_frames, _, _ = sheet_layout(num_frames)
    with Image.open(tmp_path / "p.webp") as image:
        assert (image.size, image.info["loop"]) == ((24, 16), 0)
        assert "a &lt;b&gt;" in image.info["xmp"].decode()
        levels, total_ms = [], 0
        for number in range(image.n_frames):
            image.seek(number)
            image.load()
            levels.append(int(np.asarray(image.convert("L"))[8, 12]) > 100)
            total_ms += image.info["duration"]
    expected = [bool(bright[frame]) for frame in shown_frames]
    merged = [level for place, level in enumerate(expected) if place == 0 or level != expected[place - 1]]
    assert len(shown_frames) == shown
    assert [level for place, level in enumerate(levels) if place == 0 or level != levels[place - 1]] == merged
    assert abs(total_ms - 1000 * num_frames / fps) <= 1


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 16, 17, 64, 65, 1000])
def test_sheet_holds_every_frame_up_to_64_and_both_ends_of_more(num_frames: int) -> None:
    shown, columns, rows = sheet_layout(num_frames)
    assert len(shown) == len(set(shown)) == min(num_frames, 64)
    assert shown == sorted(shown)
    assert (shown[0], shown[-1]) == (0, num_frames - 1)
    assert columns >= rows
    assert (rows - 1) * columns < len(shown) <= rows * columns


def test_damaged_picture_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.jpg"
    write_spritesheet(path, clip(16, 32, 32), metadata=METADATA)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="truncated"):
        read_size(path)
