"""Path, schedule, samplers and guidance."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medsora.diffusion.guidance import guided
from medsora.diffusion.path import interpolate, to_data, to_noise, velocity_target
from medsora.diffusion.samplers import Step, euler_steps, heun_steps, sample
from medsora.diffusion.schedule import timesteps
from medsora.errors import GenerationCanceled

PLANS = {"euler": euler_steps, "heun": heun_steps}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
Plan = Callable[[Tensor], list[Step]]


def latents() -> Tensor:
    return torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)


def test_path_runs_from_data_to_noise_frame_by_frame() -> None:
    data, noise = latents(), latents()
    t = torch.tensor([[0.0, 1.0, 0.25, 0.5]] * 2, dtype=torch.float64)
    x = interpolate(data, noise, t)
    assert torch.equal(x[:, :, 0], data[:, :, 0])
    assert torch.equal(x[:, :, 1], noise[:, :, 1])
    assert torch.allclose(x[:, :, 2], 0.75 * data[:, :, 2] + 0.25 * noise[:, :, 2])


def test_velocity_leads_from_any_point_to_both_ends() -> None:
    data, noise, t = latents(), latents(), torch.rand(2, 4, dtype=torch.float64)
    x, velocity = interpolate(data, noise, t), velocity_target(data, noise)
    assert torch.allclose(to_data(x, velocity, t), data)
    assert torch.allclose(to_noise(x, velocity, t), noise)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 250])
def test_schedule_falls_from_one_to_zero(num_steps: int, shift: float) -> None:
    times = timesteps(num_steps, shift=shift)
    assert len(times) == num_steps + 1
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift_multiplies_the_odds_of_noise(shift: float) -> None:
    # the same as the formula of the source: t / (1 - t) becomes shift times what it was
    even = torch.arange(9, 0, -1, dtype=torch.float64) / 10
    times = timesteps(10, shift=shift)[1:-1]
    assert torch.allclose(times / (1 - times), shift * even / (1 - even))


def test_shift_spends_more_steps_near_noise() -> None:
    assert (timesteps(10, shift=3.0)[1:-1] > timesteps(10)[1:-1]).all()


@pytest.mark.parametrize(("num_steps", "shift"), [(0, 1.0), (-1, 1.0), (4, 0.0), (4, float("nan"))])
def test_bad_schedules_are_refused(num_steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match="num_steps must be at least 1 and shift above 0"):
        timesteps(num_steps, shift=shift)


@plans
@settings(max_examples=25, deadline=None)
@given(num_steps=st.integers(1, 60), shift=st.floats(0.2, 5))
def test_oracle_velocity_gives_back_the_data(plan: Plan, num_steps: int, shift: float) -> None:
    data, noise = latents(), latents()
    result = sample(plan(timesteps(num_steps, shift=shift)), lambda x, t: velocity_target(data, noise), noise)
    assert torch.allclose(result, data, atol=1e-9)


def test_heun_is_second_order() -> None:
    # dx/dt = x from t=1 to 0 has the solution x(0) = x(1) / e
    noise = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    exact = noise.item() / 2.718281828459045

    def error(name: str, num_steps: int) -> float:
        return abs(sample(PLANS[name](timesteps(num_steps)), lambda x, t: x, noise).item() - exact)

    assert error("euler", 20) / error("euler", 40) == pytest.approx(2, rel=0.1)
    assert error("heun", 40) < error("euler", 40) / 10


def test_heun_averages_two_slopes_a_step_and_ends_with_an_euler_step() -> None:
    asked: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return 2 * x + t

    noise = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    result = sample(heun_steps(timesteps(2)), velocity, noise)
    assert asked == [1.0, 0.5, 0.5]  # never at t = 0
    # first step: slopes 3 at 1 and -0.5 at 1 - 0.5 * 3; 1 - 0.5 * 1.25 = 0.375. Second: 0.375 - 0.5 * 1.25
    assert result.item() == pytest.approx(-0.25)


@plans
def test_reports_every_step_and_stops_when_told(plan: Plan) -> None:
    seen: list[tuple[int, int]] = []
    sample(plan(timesteps(5)), lambda x, t: x, latents(), on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]

    calls = []

    def velocity(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return x

    def stop(done: int, total: int) -> None:
        raise GenerationCanceled

    with pytest.raises(GenerationCanceled):
        sample(plan(timesteps(5)), velocity, latents(), on_step=stop)
    assert 0.6 not in calls  # nothing of the third step was computed


@plans
def test_sampling_leaves_the_noise_as_it_was(plan: Plan) -> None:
    noise = latents()
    before = noise.clone()
    sample(plan(timesteps(3)), lambda x, t: x, noise)
    assert torch.equal(noise, before)


def test_guidance_is_the_weighted_difference() -> None:
    def velocity(x: Tensor, t: float, condition: Tensor) -> Tensor:
        return x * condition[:, :1, None, None, None] + t

    condition, null = torch.tensor([[2], [3]]), torch.tensor([7])
    x = latents()
    leaning = guided(velocity, condition, null, 2.5)(x, 0.5)
    conditional, unconditional = velocity(x, 0.5, condition), velocity(x, 0.5, null.expand(2, 1))
    assert torch.allclose(leaning, unconditional + 2.5 * (conditional - unconditional))


def test_guidance_of_one_is_none_and_costs_nothing() -> None:
    batches = []

    def velocity(x: Tensor, t: float, condition: Tensor) -> Tensor:
        batches.append(len(x))
        return x

    guided(velocity, torch.tensor([[0], [1]]), torch.tensor([2]), 1.0)(latents(), 0.5)
    assert batches == [2]
