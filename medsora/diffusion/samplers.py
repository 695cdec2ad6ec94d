"""Samplers as plain functions: from noise along the velocity field to data. They keep no state.

Each takes ``velocity_fn(x, t)`` with ``t`` a Python float (all frames alike), noise, a falling 1-D schedule
from :func:`medsora.diffusion.schedule.timesteps`, and ``on_step(done, total)``, called after every step; an
exception raised in it ends the sampling.
"""

from collections.abc import Callable
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

__all__ = ["SAMPLERS", "sample_euler", "sample_heun"]

Latents = Float[Tensor, "b c f h w"]
VelocityFn = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, int], None]


def sample_euler(
    velocity_fn: VelocityFn, noise: Latents, timesteps: Float[Tensor, " n"], *, on_step: OnStep | None = None
) -> Latents:
    """First-order steps: one evaluation of the velocity a step."""
    times = timesteps.tolist()
    x = noise
    for step, (t, t_next) in enumerate(pairwise(times), start=1):
        x = x + (t_next - t) * velocity_fn(x, t)
        if on_step is not None:
            on_step(step, len(times) - 1)
    return x


def sample_heun(
    velocity_fn: VelocityFn, noise: Latents, timesteps: Float[Tensor, " n"], *, on_step: OnStep | None = None
) -> Latents:
    """Second-order steps (Heun's rule): two evaluations a step, one in the last.

    The last step is Euler's, as in Karras et al. (arXiv 2206.00364, algorithm 1): at t = 0 the velocity is not
    trained for, and on a path that ends straight nothing is lost.
    """
    times = timesteps.tolist()
    x = noise
    for step, (t, t_next) in enumerate(pairwise(times), start=1):
        velocity = velocity_fn(x, t)
        x_next = x + (t_next - t) * velocity
        if t_next > 0:
            velocity = (velocity + velocity_fn(x_next, t_next)) / 2
            x_next = x + (t_next - t) * velocity
        x = x_next
        if on_step is not None:
            on_step(step, len(times) - 1)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"euler": sample_euler, "heun": sample_heun}
