"""The paper's diffusion against its formulas, written out in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from medsora.diffusion.ddpm import alpha_bars, ddim_step, ddim_values, ddpm_step, ddpm_values, spaced_times
from medsora.diffusion.samplers import SAMPLERS, sample

SHAPE = (2, 3, 2, 2, 2)
STEPS = [2, 3, 10, 250, 1000]
Predict = Callable[[Tensor, float], Tensor]


def published_bars() -> Tensor:
    """Products of 1 - beta, betas linear from 1e-4 to 0.02 (DDPM, section 4)."""
    kept, bars = 1.0, []
    for beta in torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist():
        kept *= 1 - beta
        bars.append(kept)
    return torch.tensor(bars, dtype=torch.float64)


def latents() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64)


def transitions(num_steps: int) -> list[tuple[float, float]]:
    """Shares of data before and after each step, in the order of sampling."""
    bars = published_bars()[spaced_times(num_steps)].tolist()
    return list(zip(bars, [1.0, *bars[:-1]], strict=True))[::-1]


def predicts(noise: Tensor, place: Tensor | float) -> Predict:
    """A network whose answer is known: noise, and the place of the variance between its bounds."""
    return lambda x, t: torch.cat([noise, torch.full_like(noise, 1.0) * place], dim=1)


def data_of(x: Tensor, noise: Tensor, share: float) -> Tensor:
    return (x - math.sqrt(1 - share) * noise) / math.sqrt(share)


def test_shares_of_data_are_the_published_ones() -> None:
    assert alpha_bars() == pytest.approx(published_bars().tolist(), rel=1e-12)
    assert alpha_bars()[0] == pytest.approx(0.9999)
    assert alpha_bars()[-1] == pytest.approx(4.04e-5, rel=1e-2)  # next to nothing of the data is left


def test_250_times_run_from_the_first_to_the_last() -> None:
    times = spaced_times(250)
    assert (times[0], times[1], times[-1]) == (0, 4, 999)  # a stride of 999 / 249, a little over 4
    assert times == sorted(set(times))
    assert len(times) == 250
    assert spaced_times(1000) == list(range(1000))


def test_times_are_those_of_a_stride_that_is_added_up_and_rounded() -> None:
    """As the field's usual code respaces a diffusion, and the released code with it."""
    for num_steps in range(2, 1001):
        stride, place, expected = 999 / (num_steps - 1), 0.0, []
        for _ in range(num_steps):
            expected.append(round(place))
            place += stride
        assert spaced_times(num_steps) == expected
    assert spaced_times(21)[10] == 499  # half-way: exactly 499.5, and a little less when the stride is added up


@pytest.mark.parametrize("num_steps", [-1, 0, 1, 1001])
def test_numbers_of_steps_that_there_are_not_are_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps must be 2 to 1000, got {num_steps}"):
        spaced_times(num_steps)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_network_that_knows_the_data_gives_it_back(sampler: str, num_steps: int) -> None:
    data, bars, asked = latents(), published_bars(), []

    def oracle(x: Tensor, t: float) -> Tensor:
        asked.append(round(1000 * t))
        share = bars[asked[-1]]
        return torch.cat([(x - share.sqrt() * data) / (1 - share).sqrt(), torch.zeros_like(x)], dim=1)

    steps = SAMPLERS[sampler].steps(num_steps)
    result = sample(steps, oracle, latents(), draw_noise=lambda number: latents())
    assert (result - data).abs().max() < 1e-6
    assert asked == spaced_times(num_steps)[::-1]


@pytest.mark.parametrize("num_steps", STEPS)
def test_a_ddim_step_puts_the_estimated_data_together_with_its_noise_again(num_steps: int) -> None:
    """DDIM, eq. 12 with sigma 0; the variance that the network predicts plays no part."""
    x, noise = latents(), latents()
    for (now, after), values in zip(transitions(num_steps), ddim_values(num_steps), strict=True):
        expected = math.sqrt(after) * data_of(x, noise, now) + math.sqrt(1 - after) * noise
        assert torch.allclose(ddim_step(predicts(noise, 7.0), x, *values), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", STEPS)
def test_a_ddpm_step_draws_from_the_posterior(num_steps: int) -> None:
    """DDPM, eq. 6 and 7; the variance between its bounds in the logarithm (Nichol and Dhariwal, eq. 15)."""
    x, noise = latents(), latents()
    plan = list(zip(transitions(num_steps), ddpm_values(num_steps), strict=True))
    for (now, after), values in plan[:-1]:
        alpha, beta = now / after, 1 - now / after
        least, greatest = beta * (1 - after) / (1 - now), beta
        of_data, of_x = math.sqrt(after) * beta / (1 - now), math.sqrt(alpha) * (1 - after) / (1 - now)
        mean = of_data * data_of(x, noise, now) + of_x * x
        for place, variance in ((-1.0, least), (1.0, greatest), (0.0, math.sqrt(least * greatest))):
            fresh = latents()
            after_step = ddpm_step(predicts(noise, place), x, *values, noise=fresh)
            assert torch.allclose(after_step, mean + math.sqrt(variance) * fresh, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", STEPS)
def test_the_last_ddpm_step_gives_the_estimate_of_the_data_and_adds_no_noise(num_steps: int) -> None:
    x, noise, values = latents(), latents(), ddpm_values(num_steps)[-1]
    last = ddpm_step(predicts(noise, 1.0), x, *values, noise=latents())
    assert torch.allclose(last, data_of(x, noise, published_bars()[0].item()), rtol=1e-9, atol=1e-9)


def test_each_channel_has_the_variance_that_is_predicted_for_it() -> None:
    x, noise, place = latents(), latents(), torch.rand(SHAPE, dtype=torch.float64)
    t, of_x, of_noise, least, greatest, scale = ddpm_values(10)[3]
    result = ddpm_step(predicts(noise, place), x, t, of_x, of_noise, least, greatest, scale, noise=torch.ones(SHAPE))
    deviation = result - (of_x * x + of_noise * noise)
    # log-variances between their bounds as the network says: -1 is the least, 1 the greatest
    assert torch.allclose(2 * deviation.log(), least + (place + 1) / 2 * (greatest - least))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_values_on_a_device_serve_as_well_as_floats(sampler: str) -> None:
    """A recorded step reads its values from 0-d tensors, in float32."""
    x, noise, fresh = (latents().float() for _ in range(3))
    network = predicts(noise, 0.3)
    for step in SAMPLERS[sampler].steps(10):
        options = {"noise": fresh} if step.draws_noise else {}
        by_floats = step.function(network, x, *step.values, **options)
        by_tensors = step.function(network, x, *torch.tensor(step.values).unbind(), **options)
        assert by_tensors.dtype == torch.float32
        assert torch.allclose(by_tensors, by_floats, rtol=1e-5, atol=1e-5)


def test_noise_that_is_needed_must_be_given() -> None:
    with pytest.raises(ValueError, match="draw_noise must be given"):
        sample(SAMPLERS["ddpm"].steps(2), predicts(latents(), 0.0), latents())
