"""Cuts: planted ones are found to the frame, motion and repeated frames are none."""

import csv
from pathlib import Path

import numpy as np
import pytest

from medsora.video_io import read_video
from training.prepare.cuts import CutDetector, find_cuts, small_grey

SHARED = Path(__file__).parents[5] / "shared" / "data"


def cuts_of(frames: np.ndarray) -> list[int]:
    detector = CutDetector()
    for frame in frames:
        detector.add(small_grey(frame))
    return detector.cuts()


def test_planted_cuts_are_found_to_the_frame(texture) -> None:  # type: ignore[no-untyped-def]
    clip = np.concatenate([texture(1, 30), texture(2, 9), texture(3, 25)])
    assert cuts_of(clip) == [30, 39]


def test_drift_is_no_cut(texture) -> None:  # type: ignore[no-untyped-def]
    assert cuts_of(texture(4, 40)) == []


def test_a_video_that_repeats_frames_has_no_cuts(texture) -> None:  # type: ignore[no-untyped-def]
    # every drift of three pixels stands out from the two frames before it, in which nothing moved
    assert cuts_of(np.repeat(texture(5, 40)[::3], 3, axis=0)) == []


def test_a_cut_in_a_still_video_is_found(texture) -> None:  # type: ignore[no-untyped-def]
    still = [np.repeat(texture(seed, 1), 12, axis=0) for seed in (6, 7)]
    assert cuts_of(np.concatenate(still)) == [12]


def test_scores_need_to_stand_out() -> None:
    assert find_cuts([0.0, 1.0, 1.0, 3.9, 1.0]) == []  # below the floor
    assert find_cuts([0.0, 5.0, 5.0, 6.0, 5.0, 5.0]) == []  # high, but so is everything
    assert find_cuts([0.0, 1.0, 1.0, 20.0, 1.0, 1.0]) == [3]
    assert find_cuts([0.0, 20.0]) == [1]  # two frames, nothing around to compare with
    assert find_cuts([]) == []


@pytest.mark.parametrize("size", [(48, 64), (33, 47), (100, 31), (720, 1280)])
def test_small_pictures_keep_the_mean(size: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    small = small_grey(frame)
    assert small.shape == (32, 32)
    assert small.mean() == pytest.approx((frame @ np.array([0.299, 0.587, 0.114])).mean(), abs=1.5)


@pytest.mark.skipif(not (SHARED / "clips.csv").is_file(), reason="the real clips are not here")
def test_splices_of_real_clips() -> None:
    """Pieces of videos of different patients, one after another: the joints are cuts, whatever moves in between."""
    with (SHARED / "clips.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    by_group: dict[tuple[str, str], str] = {}
    for row in rows:
        by_group.setdefault((row["dataset"], row["group"]), row["file"])
    found, planted, right = 0, 0, 0
    for dataset in ("laparoscopy", "lung_ultrasound"):
        files = [file for (owner, _), file in sorted(by_group.items()) if owner == dataset][:4]
        pieces = [read_video(SHARED / file)[0][20:50] for file in files]
        joints = list(np.cumsum([len(piece) for piece in pieces])[:-1])
        cuts = cuts_of(np.concatenate(pieces))
        found, planted, right = found + len(cuts), planted + len(joints), right + len(set(cuts) & set(joints))
    assert right / planted >= 0.9
    assert right / found >= 0.9
