"""Exponential moving averages of a network's weights: what is evaluated and exported.

Several are kept, each with its own half-life, because nobody knows before the end which one is best.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from training.distributed import local_part, part_like, whole_like

__all__ = ["Averages", "average_name"]


def average_name(half_life: float) -> str:
    """Name of the average with a half-life in steps: ``ema-500``."""
    return f"ema-{half_life:g}"


class Averages:
    """Averages that follow a network's parameters.

    Buffers are not averaged: batch-norm statistics are averages already, and the network's own go with each.

    Args:
        model: The trained network, as it is trained (cut over processes, if it is).
        half_lives: In steps: after so many, a weight counts half in that average. Until the run is twice as long,
            half of the steps so far stand in for it, so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, half_lives: Sequence[float]) -> None:
        self._sources: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._half_lives = {average_name(half_life): half_life for half_life in half_lives}
        self._parts = {
            name: [local_part(source.detach()).clone() for source in self._sources.values()]
            for name in self._half_lives
        }

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the half-lives."""
        return tuple(self._half_lives)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the trained network; ``step`` counts from 0."""
        sources = [local_part(source.detach()) for source in self._sources.values()]
        for name, half_life in self._half_lives.items():
            kept = 0.5 ** (1.0 / min(half_life, (step + 1) / 2))
            torch._foreach_lerp_(self._parts[name], sources, 1.0 - kept)

    def whole(self, name: str) -> dict[str, Tensor]:
        """One average, by parameter; where the network is cut all processes must ask for it."""
        return {
            parameter: whole_like(part, source.detach())
            for (parameter, source), part in zip(self._sources.items(), self._parts[name], strict=True)
        }

    @torch.no_grad()
    def load(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what :meth:`whole` gave, for every average.

        Raises:
            KeyError: An average or a parameter is not among what was saved.
        """
        for name, parts in self._parts.items():
            for (parameter, source), part in zip(self._sources.items(), parts, strict=True):
                part.copy_(local_part(part_like(saved[name][parameter], source.detach())))
