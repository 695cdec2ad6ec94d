"""Samplers as plans: which steps lead from noise to data, and what each of them computes. They keep no state.

A step is a pure function ``(predict, x, *values) -> x`` and its values, plain numbers that are known before sampling
starts. ``predict(x, t)`` is the network, ``predict(x, t, step)`` one that is told how far the step goes. On a GPU the
values come as 0-d tensors, so that one recorded graph serves every step of its kind; elsewhere as floats.

Velocity (rectified flow, :mod:`medsora.diffusion.path`): ``euler``, ``heun``, and ``shortcut`` of a network that was
trained for few long steps. Noise with learned variance (DDPM, :mod:`medsora.diffusion.ddpm`): ``ddim``, ``ddpm``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor

from medsora.config import SHORTCUT
from medsora.diffusion.ddpm import ddim_step, ddim_values, ddpm_step, ddpm_values
from medsora.diffusion.path import data_between
from medsora.diffusion.schedule import timesteps

__all__ = ["SAMPLERS", "Sampler", "Step", "Watch", "euler_steps", "heun_steps", "sample", "shortcut_steps"]

Latents = Float[Tensor, "b c f h w"]
Time = Any
"""A float, or a 0-d tensor on the device."""
PredictFn = Callable[..., Tensor]
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Step:
    """One step of a plan."""

    function: Callable[..., Tensor]
    """``(predict, x, *values) -> x``; with ``draws_noise`` it takes fresh noise as ``noise=`` too."""
    values: tuple[float, ...]
    draws_noise: bool = False
    times: tuple[float, float] | None = None
    """Time before and after, of a step along a velocity: its running estimate can be shown."""


@dataclass(frozen=True)
class Watch:
    """Somebody who may want to look at the running estimate of the data, now and then."""

    wanted: Callable[[], bool]
    """Asked before each step that has one."""
    show: Callable[[Tensor], None]
    """Given the estimate after that step; it may be changed by what follows."""


def euler_step(predict: PredictFn, x: Latents, t: Time, change: Time) -> Latents:
    """First order: along the velocity at ``t``, for ``change`` (below zero) of time."""
    after: Tensor = x + change * predict(x, t)
    return after


def heun_step(predict: PredictFn, x: Latents, t: Time, t_next: Time, change: Time) -> Latents:
    """Second order: along the mean of the velocities at both ends of an Euler step."""
    velocity = predict(x, t)
    ahead = predict(x + change * velocity, t_next)
    after: Tensor = x + change * ((velocity + ahead) / 2)
    return after


def shortcut_step(predict: PredictFn, x: Latents, t: Time, change: Time) -> Latents:
    """Along the mean velocity over the whole step, which the network is asked for.

    Source: Frans et al., arXiv 2410.12557, equation 3.
    """
    after: Tensor = x + change * predict(x, t, -change)
    return after


def euler_steps(times: Float[Tensor, " n"]) -> list[Step]:
    """One evaluation of the velocity a step, over a schedule that falls from 1 to 0."""
    return [Step(euler_step, (t, t_next - t), times=(t, t_next)) for t, t_next in pairwise(times.tolist())]


def heun_steps(times: Float[Tensor, " n"]) -> list[Step]:
    """Two evaluations a step, one in the last.

    The last step is Euler's, as in Karras et al. (arXiv 2206.00364, algorithm 1): at t = 0 the velocity is not
    trained for, and on a path that ends straight nothing is lost.
    """
    return [
        Step(heun_step, (t, t_next, t_next - t), times=(t, t_next))
        if t_next > 0
        else Step(euler_step, (t, t_next - t), times=(t, t_next))
        for t, t_next in pairwise(times.tolist())
    ]


def shortcut_steps(num_steps: int) -> list[Step]:
    """One evaluation a step, all of one size."""
    return [
        Step(shortcut_step, (t, t_next - t), times=(t, t_next)) for t, t_next in pairwise(timesteps(num_steps).tolist())
    ]


def ddim_steps(num_steps: int) -> list[Step]:
    """DDIM without noise of its own (eta 0), over ``num_steps`` of the 1000 trained times."""
    return [Step(ddim_step, values) for values in ddim_values(num_steps)]


def ddpm_steps(num_steps: int) -> list[Step]:
    """Ancestral sampling with the learned variance."""
    return [Step(ddpm_step, values, draws_noise=True) for values in ddpm_values(num_steps)]


@dataclass(frozen=True)
class Sampler:
    """A sampler by name."""

    prediction: str
    """What the network must predict, as :class:`medsora.config.DenoiserConfig` says it."""
    steps: Callable[[int], Sequence[Step]]
    """The plan for a number of steps."""
    steps_from: Callable[[int, float], Sequence[Step]] | None = None
    """The plan for a number of steps that begins at another time than 1; None where there is none."""
    has_built_in_guidance: bool = False
    """Whether the network gives guided answers by itself: then they are not guided again."""


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(
        "velocity",
        lambda num_steps: euler_steps(timesteps(num_steps)),
        lambda num_steps, start: euler_steps(start * timesteps(num_steps)),
    ),
    "heun": Sampler(
        "velocity",
        lambda num_steps: heun_steps(timesteps(num_steps)),
        lambda num_steps, start: heun_steps(start * timesteps(num_steps)),
    ),
    SHORTCUT: Sampler("velocity", shortcut_steps, has_built_in_guidance=True),
    "ddim": Sampler("noise", ddim_steps),
    "ddpm": Sampler("noise", ddpm_steps),
}


def sample(
    steps: Sequence[Step],
    predict: PredictFn,
    noise: Latents,
    *,
    draw_noise: Callable[[int], Latents] | None = None,
    on_step: OnStep | None = None,
    watch: Watch | None = None,
) -> Latents:
    """Carry noise through a plan.

    Args:
        draw_noise: Fresh noise for the step of that number, for steps that take some.
        on_step: Called with (steps done, steps in all) after each; an exception raised in it ends the sampling.

    Raises:
        ValueError: A step takes noise and ``draw_noise`` is None.
    """
    x = noise
    for number, step in enumerate(steps):
        fresh = {}
        if step.draws_noise:
            if draw_noise is None:
                raise ValueError("this sampler draws noise at every step: draw_noise must be given")
            fresh["noise"] = draw_noise(number)
        times = step.times if watch is not None and step.times is not None and watch.wanted() else None
        before, x = x, step.function(predict, x, *step.values, **fresh)
        if watch is not None and times is not None:
            watch.show(data_between(before, x, *times))
        if on_step is not None:
            on_step(number + 1, len(steps))
    return x
