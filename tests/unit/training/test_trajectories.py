"""What a teacher's trajectories hold, and the long steps that are drawn from them."""

import pytest
import torch
from torch import Tensor

from medsora.models.denoiser import Denoiser
from training.config import DistillationConfig
from training.data.latents import LatentSet
from training.recipes import recipe
from training.trajectories import Trajectories, draw_jumps, record_trajectories

CONFIG = DistillationConfig(trajectories=12, held_out=2, teacher_steps=16, batch_size=4)


def latents() -> LatentSet:
    generator = torch.Generator().manual_seed(1)
    return LatentSet(
        latents=torch.randn(6, 4, 4, 4, 4, generator=generator).half(), conditions=torch.tensor([[0, 0], [1, 1]] * 3)
    )


class Straight(torch.nn.Module):
    """A teacher whose velocity is the condition's number where there is one, and 1 where it is asked without."""

    def __init__(self) -> None:
        super().__init__()
        self.config = recipe("denoiser_tiny").model.denoiser
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.asked.append((t, condition))
        is_null = condition[:, 0] == self.config.null_condition[0]
        return torch.where(is_null, 1.0, condition[:, 0].float())[:, None, None, None, None].expand_as(x)


def record(teacher: torch.nn.Module, *, clean_prefixes: float = 0.0) -> Trajectories:
    return record_trajectories(
        teacher,  # type: ignore[arg-type]
        latents(), torch.ones(6) / 6, CONFIG, clean_prefixes=clean_prefixes, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip


def test_states_follow_the_guided_teacher() -> None:
    teacher = Straight()
    made = record(teacher)
    assert made.states.shape == (12, 9, 4, 4, 4, 4)
    assert made.num_intervals == 8
    assert len(teacher.asked) == 16
    # 1 + 1.5 (condition - 1), for a whole unit of time
    velocity = 1.0 + 1.5 * (made.conditions[:, 0].float() - 1.0)
    moved = (made.states[:, 0] - made.states[:, -1]).float()
    assert torch.allclose(moved, velocity[:, None, None, None, None].expand_as(moved), atol=5e-3)
    half = (made.states[:, 0] - made.states[:, 4]).float()
    assert torch.allclose(half, moved / 2, atol=5e-3)
    assert 0.8 < float(made.states[:, 0].float().std()) < 1.2


def test_given_frames_are_data_and_stay() -> None:
    teacher = Straight()
    made = record(teacher, clean_prefixes=0.9)
    known = made.is_known
    assert 0.5 < float(known.any(1).float().mean()) <= 1
    assert not known.all(1).any()
    still = made.states.movedim(3, 1)[known]  # (given frames, times, ...)
    assert torch.equal(still, still[:, :1].expand_as(still))
    data = latents().latents.movedim(2, 1).flatten(0, 1)
    assert all((data == frame).flatten(1).all(1).any() for frame in still[:, 0])
    assert all(bool((t[: len(known)][known[: len(t)]] == 0).all()) for t, _ in teacher.asked)


def test_it_is_the_same_again_and_a_real_network_is_followed() -> None:
    torch.manual_seed(0)
    network = Denoiser(recipe("denoiser_tiny").model.denoiser).eval()
    torch.nn.init.normal_(network.patch_out.weight, std=0.1)
    first, second = record(network), record(network)
    assert torch.equal(first.states, second.states)
    assert not torch.equal(first.states[:, 0], first.states[:, -1])


def test_jumps_join_states_of_one_trajectory() -> None:
    made = record(Straight(), clean_prefixes=0.5)
    jump = draw_jumps(made, 4000, CONFIG, torch.Generator().manual_seed(4))
    sizes = jump.step.amax(dim=1)
    share = {steps: float((sizes == 1 / steps).float().mean()) for steps in CONFIG.steps}
    assert share[4] == pytest.approx(0.5, abs=0.04)
    assert all(share[steps] == pytest.approx(1 / 6, abs=0.03) for steps in (1, 2, 8))
    times = jump.t.amax(dim=1)
    assert bool((times >= sizes - 1e-6).all())
    for steps in CONFIG.steps:  # every place is drawn
        assert len(times[sizes == 1 / steps].unique()) == steps
    # the straight teacher has the same velocity everywhere
    wanted = 1.0 + 1.5 * (jump.condition[:, 0].float() - 1.0)
    target = jump.target.movedim(2, 1)[jump.is_noisy]
    assert torch.allclose(target.flatten(1).mean(1), wanted[:, None].expand_as(jump.is_noisy)[jump.is_noisy], atol=2e-2)
    assert bool((jump.t[~jump.is_noisy] == 0).all())
    assert bool((jump.step[~jump.is_noisy] == 0).all())
    assert bool((jump.target.movedim(2, 1)[~jump.is_noisy] == 0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": ()}, "steps must be different numbers"),
        ({"steps": (4, 4)}, "steps must be different numbers"),
        ({"steps": (4, 3), "teacher_steps": 12}, "divide the most"),
        ({"teacher_steps": 12}, "multiple"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"held_out": 16_384}, "held_out"),
        ({"batch_size": 0}, "batch_size"),
        ({"weight": 0.0}, "weight"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**change)  # type: ignore[arg-type]
