"""The paper's diffusion: DDPM with linear betas, a network that predicts noise and, with it, a variance.

    x_k = sqrt(a_k) data + sqrt(1 - a_k) noise        k = 0 ... 999; a_k is the product of 1 - beta up to k

Sources: Ho et al., arXiv 2006.11239 (DDPM); Nichol and Dhariwal, arXiv 2102.09672 (learned variance, spaced times);
Song et al., arXiv 2010.02502 (DDIM). The network's time is ``t = k / 1000``.

Values are computed in float64 before sampling; the steps only multiply and add.
"""

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from jaxtyping import Float
from torch import Tensor

__all__ = ["NUM_TRAINED_TIMES", "alpha_bars", "ddim_step", "ddim_values", "ddpm_step", "ddpm_values", "spaced_times"]

NUM_TRAINED_TIMES = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02

Latents = Float[Tensor, "b c f h w"]
PredictFn = Callable[[Tensor, Any], Tensor]


def alpha_bars() -> list[float]:
    """Share of the data's variance that is left at each trained time, falling from 0.9999 to 4e-5."""
    kept, bars = 1.0, []
    for k in range(NUM_TRAINED_TIMES):
        kept *= 1 - (FIRST_BETA + (LAST_BETA - FIRST_BETA) * k / (NUM_TRAINED_TIMES - 1))
        bars.append(kept)
    return bars


def spaced_times(num_steps: int) -> list[int]:
    """``num_steps`` of the trained times, evenly spaced from 0 to 999, rising.

    The stride is added up, as in the released code: where that comes to a half, it is the last bits of the sum that
    decide, and only so are the times the same for every number of steps.

    Raises:
        ValueError: ``num_steps`` is not 2 to 1000.

    >>> spaced_times(4)
    [0, 333, 666, 999]
    """
    if not 2 <= num_steps <= NUM_TRAINED_TIMES:
        raise ValueError(f"num_steps must be 2 to {NUM_TRAINED_TIMES}, got {num_steps}")
    stride = (NUM_TRAINED_TIMES - 1) / (num_steps - 1)
    places = accumulate([stride] * (num_steps - 1), initial=0.0)
    return [round(place) for place in places]


def _transitions(num_steps: int) -> list[tuple[float, float, float]]:
    """(t, share of data now, share after the step) of each step, in the order of sampling; after the last it is 1."""
    bars, times = alpha_bars(), spaced_times(num_steps)
    after = [1.0, *(bars[k] for k in times[:-1])]
    steps = [(k / NUM_TRAINED_TIMES, bars[k], rest) for k, rest in zip(times, after, strict=True)]
    return steps[::-1]


def ddim_values(num_steps: int) -> list[tuple[float, float, float]]:
    """(t, factor of x, factor of the predicted noise) of each step: eta 0 and no clipping, as MedSora samples.

    The estimate of the data is put together with the same noise again at the next time (eq. 12 with sigma = 0), which
    is linear in both.
    """
    values = []
    for t, now, after in _transitions(num_steps):
        of_x = math.sqrt(after / now)
        values.append((t, of_x, math.sqrt(1 - after) - of_x * math.sqrt(1 - now)))
    return values


def ddim_step(predict: PredictFn, x: Latents, t: Any, of_x: Any, of_noise: Any) -> Latents:
    """One step of DDIM; the predicted variance is not used."""
    noise = predict(x, t)[:, : x.shape[1]]
    after: Tensor = of_x * x + of_noise * noise
    return after


def ddpm_values(num_steps: int) -> list[tuple[float, ...]]:
    """(t, factor of x, factor of the predicted noise, least and greatest log-variance, scale of fresh noise).

    Mean of the posterior (DDPM, eq. 7) at the estimate of the data, betas of the spaced times; the last step adds no
    noise. The least log-variance is the posterior's, which at the last step is that of the step before (it would be
    minus infinity).
    """
    transitions = _transitions(num_steps)
    posteriors = [(1 - now / after) * (1 - after) / (1 - now) for _, now, after in transitions]
    posteriors[-1] = posteriors[-2]
    values: list[tuple[float, ...]] = []
    for (t, now, after), posterior in zip(transitions, posteriors, strict=True):
        beta = 1 - now / after
        of_data = beta * math.sqrt(after) / (1 - now)
        of_x = (1 - after) * math.sqrt(now / after) / (1 - now) + of_data / math.sqrt(now)
        of_noise = -of_data * math.sqrt(1 / now - 1)
        values.append((t, of_x, of_noise, math.log(posterior), math.log(beta), float(after < 1)))
    return values


def ddpm_step(
    predict: PredictFn,
    x: Latents,
    t: Any,
    of_x: Any,
    of_noise: Any,
    least: Any,
    greatest: Any,
    scale: Any,
    *,
    noise: Latents,
) -> Latents:
    """One ancestral step: the mean, and fresh noise of the variance that the network places between its bounds."""
    predicted, place = predict(x, t).chunk(2, dim=1)
    share = (place + 1) / 2
    log_variance = share * greatest + (1 - share) * least
    after: Tensor = of_x * x + of_noise * predicted + scale * (log_variance / 2).exp() * noise
    return after
