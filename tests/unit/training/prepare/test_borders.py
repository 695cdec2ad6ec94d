"""Black borders: found to the pixel, whatever noise is in them; a dark picture has none."""

import numpy as np

from training.prepare.borders import BorderFinder
from training.prepare.config import Box


def picture_of(frames: np.ndarray) -> Box | None:
    finder = BorderFinder()
    for frame in frames:
        finder.add(frame)
    return finder.picture()


def test_letterbox_and_pillarbox(texture) -> None:  # type: ignore[no-untyped-def]
    clip = np.maximum(texture(1, 6, height=60, width=80), 40)
    framed = np.zeros((6, 100, 120, 3), np.uint8)
    framed += np.random.default_rng(0).integers(0, 12, framed.shape, dtype=np.uint8)  # noise of a codec
    framed[:, 30:90, 10:90] = clip
    framed[:, 5, 5] = 255  # a stray speck
    assert picture_of(framed) == Box(left=10, top=30, width=80, height=60)


def test_a_border_must_be_dark_in_every_frame(texture) -> None:  # type: ignore[no-untyped-def]
    clip = np.maximum(texture(2, 8), 40)
    clip[:4, :20] = 0
    assert picture_of(clip) is None
    clip[:, :20] = 0
    assert picture_of(clip) == Box(left=0, top=20, width=64, height=28)


def test_nothing_but_black_is_no_picture() -> None:
    assert picture_of(np.zeros((3, 40, 40, 3), np.uint8)) is None
    assert picture_of(np.zeros((0, 40, 40, 3), np.uint8)) is None


def test_one_dark_row_is_an_encoders(texture) -> None:  # type: ignore[no-untyped-def]
    clip = np.maximum(texture(3, 3), 40)
    clip[:, :1] = 0
    assert picture_of(clip) is None


def test_letters_in_the_border_are_no_picture(texture) -> None:  # type: ignore[no-untyped-def]
    framed = np.zeros((4, 80, 100, 3), np.uint8)
    framed[:, 20:60, 10:90] = np.maximum(texture(4, 4, height=40, width=80), 40)
    framed[:, 2:10, 5:70] = 250
    assert picture_of(framed) == Box(left=5, top=2, width=85, height=58)
    finder = BorderFinder()
    for frame in framed:
        finder.add(frame)
    letters = Box(left=4, top=1, width=68, height=10)
    assert finder.picture([letters]) == Box(left=10, top=20, width=80, height=40)


def test_one_flash_lights_up_no_border(texture) -> None:  # type: ignore[no-untyped-def]
    framed = np.zeros((40, 60, 80, 3), np.uint8)
    framed[:, 10:50, 20:60] = np.maximum(texture(5, 40, height=40, width=40), 40)
    framed[7] = 200
    assert picture_of(framed) == Box(left=20, top=10, width=40, height=40)
