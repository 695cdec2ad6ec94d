"""Frechet distances of clips: other implementations, and resamples against the long way."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import _compute_fid

from training.evaluation.bootstrap import draw_weights, generated_units
from training.evaluation.frechet import AXES, Comparison, distance
from training.metrics import frechet_distance, gaussian_statistics


def features(count: int, vectors: int, size: int, shift: float = 0.0) -> torch.Tensor:
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(size)) / size**0.5
    return torch.randn(count, vectors, size) @ mix + shift


def test_distance_is_torchmetrics_and_scipys() -> None:
    first, second = features(60, 3, 12), features(40, 3, 12, 0.3)
    ours = distance(first, second)
    moments = [(x.flatten(0, 1).double().mean(0), torch.cov(x.flatten(0, 1).double().T)) for x in (first, second)]
    theirs = _compute_fid(*moments[0], *moments[1])
    assert math.isclose(ours, float(theirs), rel_tol=1e-6)
    (m1, s1), (m2, s2) = [(m.numpy(), s.numpy()) for m, s in moments]
    root = sqrtm(s1 @ s2)
    assert math.isclose(ours, float(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real)), rel_tol=1e-6)


def test_ddof_divides_by_the_number() -> None:
    x, y = torch.randn(50, 1, 1).expand(-1, -1, 2) * torch.tensor([1.0, 0.0]), torch.zeros(50, 1, 2)
    variance = float(x[:, 0, 0].double().var(correction=0)) + float(x[:, 0, 0].double().mean() ** 2)
    assert math.isclose(distance(x, y, ddof=0), variance, rel_tol=1e-6)
    assert distance(x, y, ddof=1) > distance(x, y, ddof=0)


def test_few_vectors_of_many_features_have_the_same_distance() -> None:
    first, second = torch.randn(5, 2, 200), torch.randn(7, 2, 200) * 2 + 0.3
    moments = [gaussian_statistics(features.flatten(0, 1)) for features in (first, second)]
    assert math.isclose(distance(first, second), frechet_distance(*moments), rel_tol=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
def test_resamples_are_distances_of_repeated_clips(ddof: int) -> None:
    first, second = features(30, 4, 8), features(25, 4, 8, 0.5)
    weights = draw_weights(generated_units(30), 5, seed=0), draw_weights(generated_units(25), 5, seed=1)
    comparison = Comparison(first, second, ddof=ddof)
    drawn, only = comparison.resample(*weights), comparison.resample(weights[0], None)
    for row in range(5):
        repeated = [x.repeat_interleave(w[row].long(), dim=0) for x, w in zip((first, second), weights, strict=True)]
        assert math.isclose(float(drawn.values[row]), distance(*repeated, ddof=ddof), rel_tol=1e-3)
        assert math.isclose(float(only.values[row]), distance(repeated[0], second, ddof=ddof), rel_tol=1e-3)
    assert drawn.estimate == distance(first, second, ddof=ddof)
    assert drawn.variance_kept > 0.999


def test_wide_features_are_resampled_in_the_plane_in_which_they_vary() -> None:
    spread = torch.logspace(0, -3, 3 * AXES)
    first, second = torch.randn(80, 2, 3 * AXES) * spread, torch.randn(80, 2, 3 * AXES) * spread + 0.1
    weights = draw_weights(generated_units(80), 40, seed=0)
    drawn = Comparison(first, second).resample(weights, None)
    full = [distance(first.repeat_interleave(w.long(), dim=0), second) for w in weights]
    assert 0.98 < drawn.variance_kept < 1
    assert math.isclose(float(drawn.values.std()), float(np.std(full)), rel_tol=0.2)
    low, high = drawn.interval
    assert low < drawn.estimate < high


def test_intervals_cover_what_as_many_clips_give_on_average() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(shift: float) -> torch.Tensor:
        return torch.randn(60, 1, 4, generator=generator) + shift

    second = draw(0.0)
    sets = [draw(0.4) for _ in range(120)]
    truth = float(np.mean([distance(first, second) for first in sets]))
    covered = 0
    for trial, first in enumerate(sets):
        drawn = Comparison(first, second).resample(draw_weights(generated_units(60), 200, seed=trial), None)
        covered += drawn.interval[0] <= truth <= drawn.interval[1]
    assert covered / 120 > 0.87
