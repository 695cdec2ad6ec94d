"""Frechet distances between sets of clips, with bootstrap intervals that take seconds, not hours.

The estimate itself uses all features. Its interval is found in the plane of the :data:`AXES` directions in which both
sets together vary most: a resample then costs one eigenvalue problem of that size, whatever the network. Only the
spread is taken from there; the interval is placed on the estimate.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from training.evaluation.bootstrap import Interval, percentile_interval
from training.metrics import frechet_distance, gaussian_statistics

__all__ = ["AXES", "Comparison", "Resampled", "distance"]

AXES = 128
CHUNK_BYTES = 2**29


@dataclass(frozen=True, kw_only=True, eq=False)
class Resampled:
    """Frechet distances of resamples of one pair of sets."""

    values: Tensor
    """(resamples,) in the plane of the main axes."""
    estimate: float
    """Of the sets as they are, in all features."""
    variance_kept: float
    """Share of the features' variance that lies in the plane."""

    @property
    def interval(self) -> Interval:
        """95 %, around the estimate; never below 0."""
        low, high = percentile_interval(self.values, estimate=self.estimate)
        return max(0.0, low), max(0.0, high)

    @property
    def centred(self) -> Tensor:
        """The values, moved so that their mean is the estimate."""
        return self.values - self.values.mean() + self.estimate


def distance(first: Tensor, second: Tensor, *, ddof: int = 1) -> float:
    """Squared Frechet distance between Gaussians fitted to the features of two sets of clips.

    Args:
        first, second: (n, v, d): v feature vectors of each of n clips, all of which count alike.
        ddof: 1 divides covariances by one less than the number of vectors (as numpy.cov and pytorch-fid do), 0 by the
            number itself (as StyleGAN-V and cd-fvd do).
    """
    return frechet_distance(
        *(gaussian_statistics(_flat(features), ddof=ddof) for features in _in_their_span(first, second))
    )


class Comparison:
    """Two sets of clips: their distance, and that of resamples of them.

    Args:
        first, second, ddof: As for :func:`distance`.
    """

    def __init__(self, first: Tensor, second: Tensor, *, ddof: int = 1) -> None:
        first, second = _in_their_span(first, second)
        self.estimate = distance(first, second, ddof=ddof)
        self._ddof = ddof
        plane, self._kept = _main_axes(_flat(first), _flat(second))
        # around the mean: a resample's covariance is a difference of squares, which cancels badly far from 0
        middle = (_flat(first).double().mean(dim=0) + _flat(second).double().mean(dim=0)) / 2
        self._sets = [(features.double() - middle) @ plane for features in (first, second)]

    def resample(self, weights1: Tensor | None, weights2: Tensor | None) -> Resampled:
        """Distances of bootstrap resamples.

        Args:
            weights1, weights2: (resamples, n) of :func:`training.evaluation.bootstrap.draw_weights`; None leaves that
                set as it is. At least one is given.
        """
        both = list(zip(self._sets, (weights1, weights2), strict=True))
        products = [None if weights is None else _products(features) for features, weights in both]
        resamples = max(len(weights) for _, weights in both if weights is not None)
        rows = max(1, CHUNK_BYTES // (8 * self._sets[0].shape[-1] ** 2))
        parts = []
        for start in range(0, resamples, rows):
            pair = []
            for (features, weights), product in zip(both, products, strict=True):
                if weights is None or product is None:
                    mean, covariance = gaussian_statistics(_flat(features), ddof=self._ddof)
                    pair.append((mean[None].to(features.device), covariance[None].to(features.device)))
                else:
                    some = weights[start : start + rows].to(features.device)
                    pair.append(_weighted_statistics(features, product, some, self._ddof))
            parts.append(_distances(pair[0], pair[1]))
        return Resampled(values=torch.cat(parts).cpu(), estimate=self.estimate, variance_kept=self._kept)


def _flat(features: Tensor) -> Tensor:
    return rearrange(features, "n v d -> (n v) d")


def _in_their_span(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The same features in no more dimensions than there are vectors: distances are the same, and far cheaper."""
    together = torch.cat([_flat(first), _flat(second)]).double()
    if len(together) >= together.shape[1]:
        return first, second
    middle = together.mean(dim=0)
    basis = torch.linalg.qr((together - middle).T).Q
    return (first.double() - middle) @ basis, (second.double() - middle) @ basis


def _main_axes(first: Tensor, second: Tensor) -> tuple[Tensor, float]:
    """Directions (d, k) in which both sets together vary most, and the share of the variance along them.

    Both sets weigh the same, and the difference of their means counts as variance.
    """
    means = [features.double().mean(dim=0) for features in (first, second)]
    middle = (means[0] + means[1]) / 2
    scatter = torch.zeros(first.shape[1], first.shape[1], dtype=torch.float64, device=first.device)
    for features in (first, second):
        centred = features.double() - middle
        scatter += centred.T @ centred / (2 * len(features))
    values, vectors = torch.linalg.eigh(scatter)  # rising
    count = min(AXES, first.shape[1])
    total = values.clamp_min(0).sum()
    kept = float(values[-count:].clamp_min(0).sum() / total) if float(total) > 0 else 1.0
    return vectors[:, -count:], kept


def _products(features: Tensor) -> Tensor:
    """(n, k * k): sum over a clip's vectors of their outer products, so that a resample is one matrix product."""
    return torch.einsum("nvk,nvl->nkl", features, features).flatten(1)


def _weighted_statistics(features: Tensor, products: Tensor, weights: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Mean (r, k) and covariance (r, k, k) of each resample."""
    k = features.shape[-1]
    count = weights.sum(dim=1) * features.shape[1]
    mean = weights @ features.sum(dim=1) / count[:, None]
    second = (weights @ products / count[:, None]).reshape(-1, k, k)
    covariance = second - mean[:, :, None] * mean[:, None, :]
    return mean, covariance * (count / (count - ddof))[:, None, None]


def _distances(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """(r,) squared Frechet distances; a set that is not resampled has one row."""
    (mean1, covariance1), (mean2, covariance2) = first, second
    values, vectors = torch.linalg.eigh(covariance1)
    root = (vectors * values.clamp_min(0).sqrt()[:, None]) @ vectors.mT
    middle = root @ covariance2 @ root
    cross = torch.linalg.eigvalsh((middle + middle.mT) / 2).clamp_min(0).sqrt().sum(dim=-1)
    traces = sum(covariance.diagonal(dim1=-2, dim2=-1).sum(dim=-1) for covariance in (covariance1, covariance2))
    result: Tensor = (mean1 - mean2).square().sum(dim=-1) + traces - 2 * cross
    return result
