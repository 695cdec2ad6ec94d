"""Near-duplicates: found re-encoded, resized and trimmed; other footage and other clips of the group are not."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsora.video_io import read_video, write_mp4
from training.prepare.cuts import small_grey
from training.prepare.duplicates import Signature, find_duplicates, signature_of


def signature(frames: np.ndarray) -> Signature:
    return signature_of([small_grey(frame) for frame in frames])


def reencoded(frames: np.ndarray, folder: Path) -> np.ndarray:
    small = np.stack([np.asarray(Image.fromarray(frame).resize((50, 38))) for frame in frames])
    write_mp4(folder / "small.mp4", small, fps=20.0, crf=28)
    return read_video(folder / "small.mp4")[0]


def test_the_same_footage_is_found(texture, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    clip = texture(1, 40)
    clips = [clip, texture(2, 40), reencoded(clip, tmp_path)[10:30], texture(3, 40)]
    found = find_duplicates([signature(frames) for frames in clips], ["a", "b", "c", "d"])
    assert [(pair.first, pair.second) for pair in found] == [(0, 2)]
    assert found[0].frames >= 10
    assert found[0].share >= 0.5


def test_clips_of_one_group_may_be_alike(texture) -> None:  # type: ignore[no-untyped-def]
    clip = texture(1, 30)
    assert find_duplicates([signature(clip), signature(clip)], ["a", "a"]) == []
    assert len(find_duplicates([signature(clip), signature(clip)], ["a", "b"])) == 1


def test_frames_without_contrast_do_not_count() -> None:
    grey = np.full((30, 48, 64, 3), 90, np.uint8)
    assert len(signature(grey)) == 0
    assert find_duplicates([signature(grey), signature(grey)], ["a", "b"]) == []
    assert find_duplicates([], []) == []


@pytest.mark.parametrize("shift", [0, 40])
def test_brightness_does_not_hide_a_copy(texture, shift: int) -> None:  # type: ignore[no-untyped-def]
    clip = (texture(5, 20) * 0.7).astype(np.uint8)
    assert len(find_duplicates([signature(clip), signature(clip + shift)], ["a", "b"])) == 1


def test_many_clips_in_chunks(texture, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    clips = [texture(seed, 12) for seed in range(8)]
    clips += [clips[2], clips[7]]
    signatures, groups = [signature(clip) for clip in clips], [str(index) for index in range(10)]
    whole = find_duplicates(signatures, groups)
    monkeypatch.setattr("training.prepare.duplicates.CHUNK", 7)
    assert find_duplicates(signatures, groups) == whole
    assert [(pair.first, pair.second) for pair in whole] == [(2, 8), (7, 9)]
