"""Burned-in text: found after compression, and not seen in moving pictures, edges that stand still, or still videos."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from medsora.video_io import read_video, write_mp4
from training.prepare.overlay import OverlayFinder


def boxes_of(frames: np.ndarray) -> list:  # type: ignore[type-arg]
    finder = OverlayFinder()
    for frame in frames:
        finder.add(frame)
    return finder.boxes()


def with_text(frames: np.ndarray, text: str, place: tuple[int, int], size: int = 14) -> np.ndarray:
    drawn = []
    for frame in frames:
        image = Image.fromarray(frame)
        ImageDraw.Draw(image).text(place, text, fill=(255, 255, 255), font=ImageFont.load_default(size=size))
        drawn.append(np.asarray(image))
    return np.stack(drawn)


@pytest.fixture(scope="module")
def moving(texture) -> np.ndarray:  # type: ignore[no-untyped-def]
    return (texture(1, 30, height=200, width=320) * 0.6).astype(np.uint8)


def test_text_is_found_after_compression(moving: np.ndarray, tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", with_text(moving, "DOE JOHN 1970", (20, 30)), fps=25.0, crf=23)
    frames, _ = read_video(tmp_path / "a.mp4")
    boxes = boxes_of(frames)
    assert 10 <= min(box.left for box in boxes) <= 40
    assert 90 <= max(box.right for box in boxes) <= 150
    assert min(box.top for box in boxes) >= 20
    assert max(box.bottom for box in boxes) <= 60


def test_moving_pictures_have_none(moving: np.ndarray) -> None:
    assert boxes_of(moving) == []


def test_an_edge_that_stands_still_is_no_text(moving: np.ndarray) -> None:
    fan = moving.copy()
    fan[:, :, :60] = 0
    fan[:, 150:] = 220
    assert boxes_of(fan) == []


def test_text_that_moves_along_is_no_overlay(moving: np.ndarray) -> None:
    walking = np.stack([with_text(moving[i : i + 1], "DOE JOHN", (5 + 6 * i, 30))[0] for i in range(len(moving))])
    assert boxes_of(walking) == []


def test_nothing_is_said_of_a_still_video(moving: np.ndarray) -> None:
    still = np.repeat(with_text(moving[:1], "DOE JOHN 1970", (20, 30)), 20, axis=0)
    assert boxes_of(still) == []
    assert boxes_of(still[:1]) == []


def test_large_frames_give_boxes_in_their_own_pixels(texture) -> None:  # type: ignore[no-untyped-def]
    large = (texture(2, 16, height=720, width=1280) * 0.6).astype(np.uint8)
    (box, *_) = boxes_of(with_text(large, "HOSPITAL 42", (900, 600), size=40))
    assert 880 <= box.left <= 920
    assert 590 <= box.top <= 640
    assert box.right <= 1280
