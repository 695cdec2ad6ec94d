"""Copies are found, whatever was done to them; what merely looks alike is not; the threshold says how sure it is."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.data.clips import ClipSet
from training.data.manifest import ClipRecord
from training.evaluation.memorisation import TrainingIndex, calibrate
from training.evaluation.planted import planted_copies

FRAMES, SIZE, PATIENTS = 8, 64, 4


def smooth_clips(count: int, seed: int, frames: int = 12) -> torch.Tensor:
    """Clips of slowly changing smooth fields on a common dark-to-bright ramp: (n f h w 3) uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 4, 8, 8, generator=generator)
    field = F.interpolate(coarse, size=(frames, SIZE, SIZE), mode="trilinear")[:, 0]
    ramp = torch.linspace(60, 160, SIZE)[:, None]
    return (ramp + 30 * field).clamp(0, 255).to(torch.uint8)[..., None].expand(-1, -1, -1, -1, 3).contiguous()


@pytest.fixture(scope="module")
def training() -> ClipSet:
    clips = smooth_clips(PATIENTS, seed=1)
    records = tuple(
        ClipRecord(
            file=f"{index}.mp4", dataset="d", label="a", probe="", split="train", group=f"p{index}", frames=12,
            fps=8.0, cuts=(), licence="x", source="", attribution="",
        )
        for index in range(PATIENTS)
    )  # fmt: skip
    each = 12 - FRAMES + 1
    return ClipSet(
        records=records,
        num_frames=FRAMES,
        frames=clips.flatten(0, 1),
        starts=torch.cat([12 * index + torch.arange(each) for index in range(PATIENTS)]),
        strides=torch.ones(each * PATIENTS, dtype=torch.int64),
        clips=torch.arange(PATIENTS).repeat_interleave(each),
        conditions=torch.zeros(each * PATIENTS, 1, dtype=torch.int64),
    )


@pytest.fixture(scope="module")
def index(training: ClipSet) -> TrainingIndex:
    return TrainingIndex(training)


def test_a_copied_window_is_found_mirrored_or_not(training: ClipSet, index: TrainingIndex) -> None:
    copies = training.gather(torch.tensor([11, 2]), torch.tensor([True, False]))
    found = index.nearest(copies)
    assert found.resemblance.min() > 0.999
    assert found.window.tolist() == [11, 2]
    assert found.is_mirrored.tolist() == [True, False]


def test_every_planted_copy_stands_out_from_other_clips(training: ClipSet, index: TrainingIndex) -> None:
    others = index.nearest(smooth_clips(20, seed=2, frames=FRAMES)).resemblance
    windows = torch.tensor([0, 7, 13, 19])
    originals = training.gather(windows, torch.zeros(4, dtype=torch.bool))
    for name, copies in planted_copies(originals, reconstruct=lambda clips: clips).items():
        found = index.nearest(copies)
        assert found.resemblance.min() > others.max() + 0.1, name
        # neighbouring windows of these slow clips are nearly the same: the clip must be right
        assert training.clips[found.window].tolist() == training.clips[windows].tolist(), name
    assert others.max() < 0.8


def test_small_shifts_cost_nothing(training: ClipSet, index: TrainingIndex) -> None:
    original = training.gather(torch.tensor([6]), torch.tensor([False]))
    moved = original.roll((2, -2), dims=(2, 3))
    assert index.nearest(moved).resemblance.item() > 0.97
    far = original.roll(20, dims=3)
    assert index.nearest(far).resemblance.item() < 0.8


def test_a_patient_can_be_left_out(training: ClipSet, index: TrainingIndex) -> None:
    own = training.gather(torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.bool))
    assert index.patients == tuple(f"d/p{number}" for number in range(PATIENTS))
    found = index.nearest(own, without_patient=0)
    assert (training.clips[found.window] != 0).all()
    assert found.resemblance.max() < 0.9


def test_the_threshold_is_set_by_the_patient_most_alike_and_checked_without_him() -> None:
    unseen = {"a": torch.linspace(0.0, 0.5, 101), "b": torch.linspace(0.3, 0.8, 101), "c": torch.full((7,), 0.6)}
    threshold = calibrate(unseen)
    assert threshold.set_by == "b"
    assert threshold.value == pytest.approx(0.795)
    assert threshold.false_alarms is not None
    # without b the bar is c's 0.6: 40 of b's 101 clips pass it
    assert threshold.false_alarms == pytest.approx({"a": 0.0, "b": 40 / 101, "c": 0.0})
    assert calibrate({"only": torch.tensor([0.2, 0.4])}).false_alarms is None


def test_planted_copies_are_what_they_are_called() -> None:
    clips = smooth_clips(2, seed=3, frames=4)
    copies = planted_copies(clips)
    assert "through the autoencoder" not in copies
    assert all(copy.shape == clips.shape and copy.dtype == torch.uint8 for copy in copies.values())
    different = [name for name, copy in copies.items() if not torch.equal(copy, clips)]
    assert set(copies) - set(different) == {"unchanged"}
    moved = copies["shifted by 1 pixels"]
    assert torch.equal(moved[:, :, 1:, :-1], clips[:, :, :-1, 1:])
    errors = {name: float((copy.float() - clips.float()).square().mean().sqrt()) for name, copy in copies.items()}
    assert errors["re-encoded (H.264, crf 38)"] > errors["re-encoded (H.264, crf 28)"] > 0
    assert 9 < errors["noisy (10 grey levels)"] < 11
    assert np.isclose(errors["brighter (gain 1.15, plus 15)"], 31, atol=6)
