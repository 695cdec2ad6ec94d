"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) as a wrapper of a conditional velocity."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["guided_velocity"]

ConditionalVelocityFn = Callable[[Tensor, float, Tensor], Tensor]


def guided_velocity(
    velocity_fn: ConditionalVelocityFn,
    condition: Int[Tensor, "b k"],
    null_condition: Int[Tensor, " k"],
    guidance_scale: float,
) -> Callable[[Tensor, float], Tensor]:
    """Velocity that leans ``guidance_scale`` times as far from the unconditional one as the condition does.

    Args:
        velocity_fn: ``(x, t, condition) -> velocity``.
        guidance_scale: 1 is no guidance, and then the unconditional velocity is not computed at all.

    Returns:
        ``(x, t) -> velocity``. Both halves run as one batch of twice the size.
    """
    if guidance_scale == 1:
        return lambda x, t: velocity_fn(x, t, condition)
    both_conditions = torch.cat([condition, null_condition.expand_as(condition)])

    def velocity(x: Tensor, t: float) -> Tensor:
        conditional, unconditional = velocity_fn(torch.cat([x, x]), t, both_conditions).chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return velocity
