"""At which times a sampler stops between noise and data."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["timesteps"]


def timesteps(num_steps: int, *, shift: float = 1.0) -> Float[Tensor, " n"]:
    """Times from 1 (noise) down to exactly 0 (data), ``num_steps + 1`` of them, float64.

    Args:
        num_steps: Intervals, at least 1.
        shift: Above 1 spends more of the steps near noise, where the layout of a clip is decided; 1 is even
            spacing. Positive.

    Raises:
        ValueError: ``num_steps`` below 1 or ``shift`` not positive.

    Source of the shift: Esser et al., arXiv 2403.03206 (timestep shifting for resolution).

    >>> timesteps(4).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if num_steps < 1 or not shift > 0:
        raise ValueError(f"num_steps must be at least 1 and shift above 0, got {num_steps} and {shift}")
    even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift * even / (1 + (shift - 1) * even)
