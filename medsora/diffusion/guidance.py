"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) as a wrapper of a conditional prediction."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["guided"]

ConditionalPredictFn = Callable[..., Tensor]


def guided(
    predict: ConditionalPredictFn,
    condition: Int[Tensor, "b k"],
    null_condition: Int[Tensor, " k"],
    guidance_scale: Any,
) -> Callable[..., Tensor]:
    """Prediction that leans ``guidance_scale`` times as far from the unconditional one as the condition does.

    Args:
        predict: ``(x, t, condition) -> prediction``: velocity or noise. ``t`` is one time, or one of each frame (b f).
            Where a sampler names the size of its step, that comes fourth, as ``t`` does.
        guidance_scale: The float 1 is no guidance, and then the unconditional prediction is not computed at all. A
            0-d tensor is always guidance.

    Returns:
        ``(x, t) -> prediction``, or ``(x, t, step)``. Both halves run as one batch of twice the size.
    """
    if isinstance(guidance_scale, float | int) and guidance_scale == 1:
        return lambda x, t, *step: predict(x, t, condition, *step)

    def prediction(x: Tensor, t: Any, *step: Any) -> Tensor:
        # put together at each step: a recorded one reads the condition that its buffer holds by then
        both_conditions = torch.cat([condition, null_condition.expand_as(condition)])
        times, *steps = (
            torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() else value for value in (t, *step)
        )
        conditional, unconditional = predict(torch.cat([x, x]), times, both_conditions, *steps).chunk(2)
        leaning: Tensor = unconditional + guidance_scale * (conditional - unconditional)
        return leaning

    return prediction
