"""Resamples and intervals: what is drawn together, agreement with scipy, and coverage where the truth is known."""

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from training.data.clips import ClipSet
from training.data.manifest import ClipRecord
from training.evaluation.bootstrap import (
    Units,
    draw_weights,
    generated_units,
    mean_interval,
    percentile_interval,
    units_of_windows,
)


def clips_of(groups: list[str], windows_each: int = 3) -> ClipSet:
    """One clip a group entry, each with some windows."""
    records = tuple(
        ClipRecord(
            file=f"{index}.mp4", dataset="d", label="a", probe="", split="train", group=group, frames=20, fps=8.0,
            cuts=(), licence="x", source="", attribution="",
        )
        for index, group in enumerate(groups)
    )  # fmt: skip
    count = len(groups) * windows_each
    return ClipSet(
        records=records,
        num_frames=4,
        frames=torch.zeros(20 * len(groups), 8, 8, 3, dtype=torch.uint8),
        starts=torch.arange(count),
        strides=torch.ones(count, dtype=torch.int64),
        clips=torch.arange(len(groups)).repeat_interleave(windows_each),
        conditions=torch.zeros(count, 1, dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("groups", "kind", "count"),
    [
        (["a", "b", "c", "d", "e", "e"], "patients", 5),
        (["a", "a", "a", "b", "b", "b"], "clips", 6),
        (["a", "b"], "windows", 6),
    ],
)
def test_the_largest_units_of_which_there_are_enough_are_drawn(groups: list[str], kind: str, count: int) -> None:
    clips = clips_of(groups)
    units = units_of_windows(clips, torch.arange(len(clips)))
    assert (units.kind, units.count) == (kind, count)
    assert str(units) == f"{count} {kind}"


def test_windows_of_one_patient_are_drawn_together() -> None:
    units = Units(kind="patients", member=torch.tensor([0, 1, 1, 2, 2, 2]))
    weights = draw_weights(units, 500, seed=3)
    assert torch.equal(weights[:, 1], weights[:, 2])
    assert torch.equal(weights[:, 3], weights[:, 5])
    per_unit = weights[:, [0, 1, 3]]
    assert torch.equal(per_unit.sum(dim=1), torch.full((500,), 3.0, dtype=torch.float64))
    assert len({tuple(row) for row in per_unit.tolist()}) == 10  # every multiset of three out of three
    assert torch.equal(weights, draw_weights(units, 500, seed=3))
    assert not torch.equal(weights, draw_weights(units, 500, seed=4))


def test_interval_of_a_mean_is_scipys() -> None:
    values = torch.from_numpy(np.random.default_rng(0).exponential(size=80))
    ours = mean_interval(values, draw_weights(generated_units(80), 20_000, seed=0))
    theirs = bootstrap(
        (values.numpy(),), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.01)


def test_intervals_cover_the_truth_only_when_patients_are_drawn_whole() -> None:
    rng = np.random.default_rng(0)
    member = torch.arange(20).repeat_interleave(10)
    patients, windows = Units(kind="patients", member=member), generated_units(200)
    covered = {"patients": 0, "windows": 0}
    for trial in range(80):
        of_patient = rng.normal(size=20)  # truth: a mean of 0
        values = torch.from_numpy(of_patient[member.numpy()] + 0.1 * rng.normal(size=200))
        for name, units in (("patients", patients), ("windows", windows)):
            low, high = mean_interval(values, draw_weights(units, 300, seed=trial))
            covered[name] += low <= 0 <= high
    assert covered["patients"] / 80 > 0.87
    assert covered["windows"] / 80 < 0.6


def test_centring_keeps_the_width() -> None:
    values = torch.linspace(10, 20, 1001)
    low, high = percentile_interval(values)
    moved = percentile_interval(values, estimate=5.0)
    assert (round(low, 2), round(high, 2)) == (10.25, 19.75)
    assert (round(moved[0], 2), round(moved[1], 2)) == (0.25, 9.75)
