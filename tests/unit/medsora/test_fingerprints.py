"""Fingerprints: the nearest one is found exactly, and copies of training clips in whatever way they were altered."""

import random
from typing import Any

import numpy as np
import pytest

from medsora.fingerprints import FINGERPRINT_BYTES, FingerprintSet, TrainingFingerprints, fingerprint

Frames = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (17, 23), (8, 8)])
def test_brightness_is_told_apart(size: tuple[int, int]) -> None:
    dark, bright = (np.full((5, *size, 3), level, np.uint8) for level in (10, 30))
    found = FingerprintSet()
    found.put([1], [fingerprint(bright)])
    assert found.nearest(fingerprint(dark)) == 20.0


def test_it_is_the_mean_of_what_it_stands_for() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 48, 32, 3), dtype=np.uint8)
    means = frames.mean(axis=-1).reshape(4, 16, 3, 16, 2).mean(axis=(2, 4))
    picture = np.frombuffer(fingerprint(frames), np.uint8).reshape(4, 16, 16)
    assert np.abs(picture - means).max() <= 0.501


def _marks(kind: str, count: int) -> Frames:
    """Pictures that the bound serves well, badly, and not at all."""
    drawn = np.random.default_rng(3)
    if kind == "smooth":
        coarse = drawn.integers(0, 256, (count, 4, 4, 4))
        return np.asarray(coarse.repeat(4, axis=2).repeat(4, axis=3).reshape(count, -1), np.uint8)
    if kind == "noise":
        return drawn.integers(0, 256, (count, FINGERPRINT_BYTES), dtype=np.uint8)
    board = np.indices((4, 16, 16)).sum(axis=0).reshape(1, -1) % 2 * 255  # all blocks have the same sum
    return np.asarray(np.where(drawn.random((count, 1)) < 0.5, board, 255 - board), np.uint8)


@pytest.mark.parametrize("kind", ["smooth", "noise", "boards"])
def test_the_nearest_is_that_of_a_search_through_all(kind: str) -> None:
    marks = _marks(kind, 700)
    found = FingerprintSet()
    for begin in range(0, 600, 97):
        numbers = range(begin, min(begin + 97, 600))
        found.put(numbers, [marks[number].tobytes() for number in numbers])
    assert len(found) == 600
    chance = random.Random(4)
    for query in marks[600:630]:
        near = marks[chance.randrange(600)] // 2 + query // 2  # between the query and one of them
        for mark in (query, near):
            distances = np.sqrt(np.square(marks[:600].astype(float) - mark).mean(axis=1))
            assert found.nearest(mark.tobytes()) == pytest.approx(distances.min(), abs=1e-9)
    own = [found.nearest(marks[number].tobytes(), without=number) for number in range(20)]
    for number, distance in enumerate(own):
        others = np.delete(marks[:600], number, axis=0).astype(float)
        assert distance == pytest.approx(np.sqrt(np.square(others - marks[number]).mean(axis=1)).min(), abs=1e-9)


def test_a_number_has_one_fingerprint() -> None:
    marks = _marks("noise", 3)
    found = FingerprintSet()
    assert found.nearest(marks[0].tobytes()) == float("inf")
    found.put([7, 8], [marks[0].tobytes(), marks[1].tobytes()])
    found.put([7], [marks[2].tobytes()])
    assert len(found) == 2
    assert found.nearest(marks[2].tobytes()) == 0.0
    assert found.nearest(marks[0].tobytes()) > 0
    assert found.nearest(marks[1].tobytes(), without=8) > 0


@pytest.fixture(scope="module")
def scenes() -> Frames:
    """Clips of blobs that move: smooth, as what is seen through a lens or a probe is."""
    drawn = np.random.default_rng(1)
    down, right = np.mgrid[:64, :64] / 64
    clips = np.zeros((40, 8, 64, 64))
    for clip in clips:
        for _ in range(12):
            y, x, size, height, dy, dx = drawn.uniform([0, 0, 0.05, 40, -0.1, -0.1], [1, 1, 0.2, 160, 0.1, 0.1])
            for time, frame in enumerate(clip):
                away = (down - y - dy * time / 8) ** 2 + (right - x - dx * time / 8) ** 2
                frame += height * np.exp(-away / (2 * size**2))
    return np.asarray(clips.clip(0, 255), np.uint8)[..., None].repeat(3, axis=-1)


def _altered(clip: Frames, how: str) -> Frames:
    if how == "mirrored":
        return clip[:, :, ::-1]
    if how == "shifted":
        return np.roll(clip, (2, -2), axis=(1, 2))
    if how == "cropped":
        rows = (np.arange(64) * 0.95 + 1.6).astype(int)
        return clip[:, rows][:, :, rows]
    if how == "brighter":
        return np.asarray((clip * 0.7 + 40), np.uint8)
    return clip


@pytest.mark.parametrize("how", ["unchanged", "mirrored", "shifted", "cropped", "brighter"])
def test_altered_copies_resemble_what_they_are_of(scenes: Frames, how: str) -> None:
    known = TrainingFingerprints(b"".join(map(fingerprint, scenes[:20])))
    assert len(known) == 20
    copies = [known.resemblance(_altered(clip, how)) for clip in scenes[:20]]
    others = [known.resemblance(clip) for clip in scenes[20:]]
    assert min(copies) > 0.97
    assert max(others) < 0.9


def test_representatives_leave_out_what_is_there_already(scenes: Frames) -> None:
    rng = np.random.default_rng(3)
    noisy = [np.asarray((scenes[0] + rng.normal(0, 6, scenes[0].shape)).clip(0, 255), np.uint8) for _ in range(20)]
    known = TrainingFingerprints(b"".join(map(fingerprint, [*noisy, scenes[1], scenes[2]])))
    first, *rare = known.representatives(3)
    assert first < 20
    assert rare == [20, 21]
    assert known.representatives(22) == known.representatives(500) == list(range(22))


def test_representatives_of_pictures_without_contrast_are_different_ones() -> None:
    flat = [np.full((16, 64, 64, 3), level, np.uint8) for level in (0, 90, 180)]
    assert TrainingFingerprints(b"".join(map(fingerprint, flat))).representatives(2) == [0, 1]
