"""Exponential moving average of a network's weights: what is evaluated and exported."""

import copy

import torch
from torch import Tensor, nn

__all__ = ["ExponentialMovingAverage"]


class ExponentialMovingAverage:
    """A second copy of a network that follows the trained one.

    Parameters are averaged; buffers (batch-norm statistics, which are averages already) are copied.

    Args:
        model: The trained network (not its compiled wrapper).
        decay: Share of the old average that stays at each step, in [0, 1). Early on
            ``(1 + step) / (10 + step)`` where that is less, so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._averages: list[Tensor] = list(self.model.parameters())
        self._sources: list[Tensor] = list(model.parameters())
        self._buffers: list[tuple[Tensor, Tensor]] = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the trained network; ``step`` counts from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._sources, 1.0 - decay)
        for average, source in self._buffers:
            average.copy_(source)
