"""Inception score of known probabilities, of torchmetrics, and of resamples made the long way."""

import math

import pytest
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore

from training.evaluation.bootstrap import draw_weights, generated_units
from training.evaluation.inception_score import inception_score, resampled_scores, split_scores


def test_score_of_known_probabilities() -> None:
    unsure = torch.full((6, 2, 5), 0.2)
    sure = nn.functional.one_hot(torch.arange(10) % 5).float().reshape(5, 2, 5)
    assert math.isclose(inception_score(unsure), 1.0, rel_tol=1e-9)
    assert math.isclose(inception_score(sure), 5.0, rel_tol=1e-9)
    assert math.isclose(inception_score(sure[:1, :1]), 1.0, rel_tol=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save:UserWarning")
def test_score_is_torchmetrics() -> None:
    logits = torch.randn(40, 7) * 2
    metric = InceptionScore(feature=nn.Identity(), splits=2)
    metric.update(logits)
    state = torch.get_rng_state()  # torchmetrics shuffles before it splits
    theirs = metric.compute()
    torch.set_rng_state(state)
    shuffled = logits[torch.randperm(40)].softmax(dim=1)
    mean, std = split_scores(shuffled.reshape(20, 2, 7), splits=2)
    assert math.isclose(mean, float(theirs[0]), rel_tol=1e-5)
    assert math.isclose(std, float(theirs[1]) / 2**0.5, rel_tol=1e-4)  # theirs divides by one less


def test_resamples_are_scores_of_repeated_clips() -> None:
    probabilities = torch.randn(12, 3, 6).softmax(dim=-1)
    weights = draw_weights(generated_units(12), 4, seed=0)
    for row, score in enumerate(resampled_scores(probabilities, weights).tolist()):
        repeated = probabilities.repeat_interleave(weights[row].long(), dim=0)
        assert math.isclose(score, inception_score(repeated), rel_tol=1e-9)


def test_parts_are_scored_apart() -> None:
    sure = nn.functional.one_hot(torch.arange(4)).float().repeat_interleave(5, dim=0).reshape(20, 1, 4)
    assert math.isclose(inception_score(sure), 4.0, rel_tol=1e-9)
    mean, std = split_scores(sure, splits=4)  # each part shows one class
    assert math.isclose(mean, 1.0, rel_tol=1e-6)
    assert std < 1e-6
