"""THE convention of time and velocity; nothing else in the code base writes ``1 - t``.

    x_t = (1 - t) * data + t * noise        t in [0, 1]; 0 is data, 1 is noise
    velocity = noise - data                  what the network predicts; sampling goes from t = 1 to t = 0

This is rectified flow (Liu et al., arXiv 2209.03003) with time reversed. Time may differ from one
latent frame to the next: a frame held at t = 0 stays as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["data_between", "each_frame", "held", "interpolate", "to_data", "to_noise", "velocity_target"]


def _over_latents(t: Tensor) -> Tensor:  # (b f) -> (b 1 f 1 1)
    return t[:, None, :, None, None]


def interpolate(
    data: Float[Tensor, "b c f h w"], noise: Float[Tensor, "b c f h w"], t: Float[Tensor, "b f"]
) -> Float[Tensor, "b c f h w"]:
    """Point at time ``t`` of each frame on the straight path from data to noise."""
    time = _over_latents(t)
    return (1 - time) * data + time * noise


def velocity_target(data: Float[Tensor, "b c f h w"], noise: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f h w"]:
    """Constant velocity of the path: what the network learns to predict."""
    return noise - data


def to_data(
    x: Float[Tensor, "b c f h w"], velocity: Float[Tensor, "b c f h w"], t: Float[Tensor, "b f"]
) -> Float[Tensor, "b c f h w"]:
    """Data end of the path through ``x`` at time ``t`` with this velocity: the running estimate."""
    return x - _over_latents(t) * velocity


def to_noise(
    x: Float[Tensor, "b c f h w"], velocity: Float[Tensor, "b c f h w"], t: Float[Tensor, "b f"]
) -> Float[Tensor, "b c f h w"]:
    """Noise end of the path through ``x`` at time ``t`` with this velocity."""
    return x + (1 - _over_latents(t)) * velocity


def data_between(
    before: Float[Tensor, "b c f h w"], after: Float[Tensor, "b c f h w"], t: float, t_next: float
) -> Float[Tensor, "b c f h w"]:
    """Data end of the straight path that a step from time ``t`` to ``t_next`` went along; what did not move stays."""
    velocity = (after - before) / (t_next - t)
    return to_data(after, velocity, after.new_full((after.shape[0], after.shape[2]), t_next))


def each_frame(value: Any, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b f"]:
    """A time, or the size of a step, that all latent frames of ``x`` share or that is given for each, as (b f).

    At least float32, whatever the type of ``x``: bfloat16 has no room for 250 times.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.as_tensor(value, dtype=dtype, device=x.device).expand(x.shape[0], x.shape[2])


def held(predict: Callable[..., Tensor], is_known: Bool[Tensor, "b f"]) -> Callable[..., Float[Tensor, "b c f h w"]]:
    """``(x, t) -> velocity``, or ``(x, t, step)``, for clips with frames that are known: those are at t = 0, and stay.

    Args:
        predict: The same, of ``t`` for each frame (b f).
        is_known: In ``x`` these frames must hold the data, from the start; samplers leave them as they are.
    """

    def velocity(x: Tensor, t: Any, *step: Any) -> Tensor:
        predicted = predict(x, *(each_frame(value, x).masked_fill(is_known, 0.0) for value in (t, *step)))
        return predicted.masked_fill(_over_latents(is_known), 0.0)

    return velocity
