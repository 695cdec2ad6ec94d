"""Inception score: class probabilities of frames, sure of each and different between them.

Source: Salimans et al., arXiv 1606.03498. ImageNet's classes mean nothing in an ultrasound image: the score is
reported because papers report it, and only beside that of real clips.
"""

from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["inception_score", "resampled_scores", "split_scores"]


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean divergence of frames' class probabilities from their average; 1 to the number of classes.

    Args:
        probabilities: (n, v, k): v frames of each of n clips, each summing to 1.
    """
    weights = torch.ones(1, len(probabilities), dtype=torch.float64)
    return float(resampled_scores(probabilities, weights)[0])


def resampled_scores(probabilities: Tensor, weights: Tensor) -> Tensor:
    """Scores (resamples,) of bootstrap resamples.

    Args:
        weights: (resamples, n) of :func:`training.evaluation.bootstrap.draw_weights`.
    """
    values = probabilities.double()
    weights = weights.to(values.device)
    # the divergence splits into the entropy of the average, less the mean entropy
    entropy = torch.special.entr(values).sum(dim=-1).mean(dim=1)
    share = weights / weights.sum(dim=1, keepdim=True)
    average = share @ values.mean(dim=1)
    return torch.exp(torch.special.entr(average).sum(dim=-1) - share @ entropy).cpu()


def split_scores(probabilities: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over parts of the frames, in order: the form in which papers print the score.

    Args:
        splits: Parts; no more than there are frames.
    """
    frames = rearrange(probabilities, "n v k -> (n v) 1 k")
    edges = torch.linspace(0, len(frames), splits + 1).long().tolist()
    scores = torch.tensor([inception_score(frames[a:b]) for a, b in pairwise(edges) if b > a])
    return float(scores.mean()), float(scores.std(correction=0))
