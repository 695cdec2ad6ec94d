"""Windows: never across a cut, at the clip's own stride, mirrored left to right only."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medsora.video_io import read_video
from training.config import DataConfig
from training.data.clips import ClipSet, sampling_weights
from training.data.windows import stride_for, window_starts
from training.errors import DataError
from training.recipes import autoencoder_tiny
from training.runs import load_split

CPU = torch.device("cpu")


def load(table: Path, split: str = "train", **changes: object) -> ClipSet:
    recipe = autoencoder_tiny()
    data: DataConfig = dataclasses.replace(recipe.data, **changes)  # type: ignore[arg-type]
    return load_split(table, data, recipe.model, split, device=CPU, step=1)


@given(
    frames=st.integers(1, 80),
    cuts=st.sets(st.integers(1, 79)),
    num_frames=st.integers(1, 16),
    stride=st.integers(1, 5),
    step=st.integers(1, 7),
)
def test_no_window_holds_two_scenes(frames: int, cuts: set[int], num_frames: int, stride: int, step: int) -> None:
    inside = sorted(cut for cut in cuts if cut < frames)
    scene = np.searchsorted(inside, np.arange(frames), side="right")
    starts = window_starts(frames, cuts=inside, num_frames=num_frames, stride=stride, step=step)
    for start in starts:
        window = start + stride * np.arange(num_frames)
        assert window[-1] < frames
        assert len(set(scene[start : window[-1] + 1])) == 1
    if step == 1:  # and none is left out
        span = (num_frames - 1) * stride
        whole = [s for s in range(max(0, frames - span)) if scene[s] == scene[s + span]]
        assert starts == whole


@pytest.mark.parametrize(("fps", "stride"), [(25.0, 3), (39.0, 5), (18.0, 2), (29.97, 4), (4.0, 1), (8.0, 1)])
def test_stride_is_the_nearest_to_the_target(fps: float, stride: int) -> None:
    assert stride_for(fps, 8.0) == stride


def test_windows_are_the_files_own_frames(table: Path) -> None:
    clips = load(table)
    assert [record.label for record in clips.records] == ["regular", "regular", "covid", "viral"]
    index = int((clips.clips == 2).nonzero()[3])  # fourth window of the third clip: frames 3, 5, 7, ...
    window = clips.gather(torch.tensor([index]), torch.tensor([False]))[0]
    frames, _ = read_video(table.parent / clips.records[2].file)
    assert torch.equal(window, torch.from_numpy(frames[3 : 3 + 32 : 2]))
    assert clips.conditions[index].tolist() == [1, 0]
    assert set(clips.strides.tolist()) == {2}


def test_the_cut_clip_has_fewer_windows(table: Path) -> None:
    clips = load(table)
    counts = torch.bincount(clips.clips).tolist()
    # 31 frames a window: 30 starts in 60 frames; with a cut at 33 only the first scene is long enough
    assert counts == [30, 3, 30, 30]


def test_the_test_split_is_apart(table: Path) -> None:
    assert [record.file for record in load(table, "test").records] == ["clip5.mp4"]


def test_flips_mirror_left_to_right(table: Path) -> None:
    clips = load(table)
    indices = torch.tensor([0, 40])
    plain = clips.gather(indices, torch.tensor([False, False]))
    mixed = clips.gather(indices, torch.tensor([True, False]))
    assert plain.dtype == torch.uint8
    assert torch.equal(mixed[0], plain[0].flip(2))  # (f h w c): width
    assert torch.equal(mixed[1], plain[1])


def test_wrong_size_and_length_are_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"clip0.mp4 is 32x32 pixels, the recipe wants 64x32"):
        load(table, width=64)
    for clip in table.parent.glob("*.mp4"):
        (tmp_path / clip.name).symlink_to(clip)
    altered = tmp_path / "clips.csv"
    altered.write_text(table.read_text(encoding="utf-8").replace(",60,", ",61,", 1), encoding="utf-8")
    with pytest.raises(DataError, match=r"clip0\.mp4 has 60 frames, the table says 61"):
        load(altered)
    (tmp_path / "clip0.mp4").unlink()
    with pytest.raises(DataError, match=r"clip0.mp4 cannot be decoded"):
        load(altered)
    with pytest.raises(DataError, match="none of the 4 clips has 48 frames"):
        load(table, num_frames=48)


def test_sampling_weights_temper_the_classes() -> None:
    conditions = torch.tensor([[0, 0]] * 16 + [[1, 0]] * 4 + [[1, 1]])
    for exponent, shares in ((1.0, [16, 4, 1]), (0.5, [4, 2, 1]), (0.0, [1, 1, 1])):
        weights = sampling_weights(conditions, exponent)
        mass = torch.stack([weights[:16].sum(), weights[16:20].sum(), weights[20:].sum()])
        expected = torch.tensor(shares, dtype=torch.float32)
        torch.testing.assert_close(mass, expected / expected.sum())
