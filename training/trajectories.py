"""What a teacher samples, and where it was on the way: from this a network learns to take long steps.

A trajectory is one clip's latents at even times from 1 (noise) to 0. Teachers are guided; the student has it built in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medsora.diffusion.guidance import guided
from medsora.diffusion.path import each_frame, held
from medsora.diffusion.samplers import euler_steps, sample
from medsora.diffusion.schedule import timesteps
from medsora.models.denoiser import Denoiser
from training.config import DistillationConfig
from training.data.latents import LatentSet
from training.objective import draw_clean_prefixes

__all__ = ["Jump", "Trajectories", "draw_jumps", "record_trajectories"]

Report = Callable[[str], None]
RECORD_BATCH = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectories:
    """Ways of a teacher, on the training device."""

    states: Float[Tensor, "n times c f h w"]
    """float16, at even times: the first is noise, the last is what was sampled."""
    conditions: Int[Tensor, "n k"]
    is_known: Bool[Tensor, "n f"]
    """Frames that were given clean: the same in all states."""

    def __len__(self) -> int:
        return len(self.states)

    @property
    def num_intervals(self) -> int:
        """Between the first and the last time."""
        return self.states.shape[1] - 1

    def part(self, rows: slice) -> "Trajectories":
        """Some of them."""
        return Trajectories(states=self.states[rows], conditions=self.conditions[rows], is_known=self.is_known[rows])


@dataclass(frozen=True, kw_only=True, eq=False)
class Jump:
    """Examples of long steps: what the student is given, and what it should answer."""

    x: Float[Tensor, "b c f h w"]
    t: Float[Tensor, "b f"]
    step: Float[Tensor, "b f"]
    """How far it goes from ``t`` towards 0."""
    condition: Int[Tensor, "b k"]
    target: Float[Tensor, "b c f h w"]
    """Mean velocity of the teacher on that way."""
    is_noisy: Bool[Tensor, "b f"]


@torch.no_grad()
def record_trajectories(
    teacher: Denoiser,
    data: LatentSet,
    weights: Float[Tensor, " n"],
    config: DistillationConfig,
    *,
    clean_prefixes: float,
    generator: torch.Generator,
    precision: torch.dtype | None = None,
    report: Report = lambda text: None,
) -> Trajectories:
    """Let the teacher sample.

    Args:
        teacher: In evaluation mode, on the device of ``data``; a network without step sizes.
        data: Whose conditions are asked for, and whose first frames are given.
        weights: How often each window is drawn.
        clean_prefixes: Share of clips whose first frames are given.
        precision: Of autocast; None for none.
    """
    device, shape = data.latents.device, data.latents.shape[1:]
    per_interval = config.teacher_steps // max(config.steps)
    plan = euler_steps(timesteps(config.teacher_steps))
    null = torch.tensor(teacher.config.null_condition, device=device)
    rows = torch.multinomial(weights, config.trajectories, replacement=True, generator=generator)
    is_known = draw_clean_prefixes(config.trajectories, shape[1], probability=clean_prefixes, generator=generator)
    states = torch.empty(config.trajectories, max(config.steps) + 1, *shape, dtype=torch.float16, device=device)

    def predict(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return cast(Tensor, teacher(x, each_frame(t, x), condition)).float()

    for begin in range(0, config.trajectories, RECORD_BATCH):
        some = slice(begin, min(begin + RECORD_BATCH, config.trajectories))
        known, condition = is_known[some], data.conditions[rows[some]]
        noise = torch.randn(len(known), *shape, generator=generator, device=device)
        x = torch.where(known[:, None, :, None, None], data.latents[rows[some]].float(), noise)
        velocity = held(guided(predict, condition, null, config.guidance_scale), known)
        states[some, 0] = x.half()
        with torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None):
            for interval in range(max(config.steps)):
                x = sample(plan[interval * per_interval : (interval + 1) * per_interval], velocity, x)
                states[some, interval + 1] = x.half()
        if (begin // RECORD_BATCH) % 16 == 0:
            report(f"trajectories: {some.stop} of {config.trajectories}")
    return Trajectories(states=states, conditions=data.conditions[rows], is_known=is_known)


def draw_jumps(trajectories: Trajectories, count: int, config: DistillationConfig, generator: torch.Generator) -> Jump:
    """Draw long steps: half of them of the default size, the others of any other one; each from any of its places."""
    device, finest = trajectories.states.device, trajectories.num_intervals
    rows = torch.randint(len(trajectories), (count,), generator=generator, device=device)
    draw = torch.rand(2, count, generator=generator, device=device)
    sizes = torch.tensor(config.steps, device=device)
    others = max(1, len(config.steps) - 1)
    # the first half of [0, 1) is the default, what is left is shared out evenly
    which = torch.where(draw[0] < 0.5, 0, 1 + ((draw[0] - 0.5) * 2 * others).long()).clamp_max(len(config.steps) - 1)
    num_steps = sizes[which]
    place = (draw[1] * num_steps).long()
    length = finest // num_steps
    before = trajectories.states[rows, place * length].float()
    after = trajectories.states[rows, (place + 1) * length].float()
    is_known = trajectories.is_known[rows]
    step = (1.0 / num_steps)[:, None].expand_as(is_known)
    return Jump(
        x=before,
        t=(1.0 - place / num_steps)[:, None].expand_as(is_known).masked_fill(is_known, 0.0),
        step=step.masked_fill(is_known, 0.0),
        condition=trajectories.conditions[rows],
        target=(before - after) * num_steps[:, None, None, None, None],
        is_noisy=~is_known,
    )
