"""Training of a denoiser to sample in few steps, while it stays able to sample in many.

Of each step's clips some learn velocities from data, as :mod:`training.denoiser_task` has it; the others learn long
steps from trajectories of a teacher (:mod:`training.trajectories`). The network is told the size of a step, as in
shortcut models (Frans et al., arXiv 2410.12557); the targets are the teacher's, as in Luhman and Luhman (arXiv
2101.02388), and not the network's own shorter steps, whose errors would add up.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from medsora.diffusion.path import each_frame, held
from medsora.diffusion.samplers import sample, shortcut_steps
from medsora.models.autoencoder import VideoAutoencoder
from medsora.models.denoiser import Denoiser
from training.config import TrainConfig
from training.data.clips import ClipSet, index_batches
from training.data.latents import LatentSet
from training.denoiser_task import EVALUATION_BATCH, DenoiserTask
from training.errors import TrainingError
from training.objective import flow_matching_loss
from training.shown import named_videos, shown_noise
from training.trajectories import Trajectories, draw_jumps

__all__ = ["DistillationTask"]


class DistillationTask(DenoiserTask):
    """Velocities of data and long steps of a teacher, together.

    Args:
        trajectories: Of the teacher; the last ``distillation.held_out`` are not trained on.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Denoiser,
        train: LatentSet,
        test: LatentSet,
        *,
        trajectories: Trajectories,
        clips: ClipSet,
        autoencoder: VideoAutoencoder | None = None,
    ) -> None:
        super().__init__(config, model, train, test, clips=clips, autoencoder=autoencoder)
        if config.distillation is None:
            raise TrainingError(f"{config.recipe} has no distillation")
        self.distillation = config.distillation
        self.trajectories = trajectories.part(slice(0, len(trajectories) - self.distillation.held_out))
        self.unseen = trajectories.part(slice(len(self.trajectories), len(trajectories)))

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        of_data, parts = super().loss(generator, step)
        jump = draw_jumps(self.trajectories, self.distillation.batch_size, self.distillation, generator)
        x, t, size, condition, target, is_noisy = (
            self._share.of(value) for value in (jump.x, jump.t, jump.step, jump.condition, jump.target, jump.is_noisy)
        )
        answer = cast(Tensor, self._model(x, t, condition, size))
        of_jumps = flow_matching_loss(answer, target, is_noisy)
        parts["shortcut_mse"] = of_jumps.detach()
        return of_data + self.distillation.weight * of_jumps, parts

    @torch.no_grad()
    def evaluate(self, average: nn.Module) -> dict[str, float]:
        """Also, for each number of steps, how far the clips of unseen noise end from those of the teacher.

        ``shortcut_N_error`` is the root mean square over all latent values but the given frames; latents have unit
        variance.
        """
        figures = super().evaluate(average)
        for num_steps in sorted(self.distillation.steps):
            squares, count = 0.0, 0
            for rows in index_batches(len(self.unseen), EVALUATION_BATCH, self.unseen.states.device):
                states, known = self.unseen.states[rows].float(), self.unseen.is_known[rows]
                made = _sample(average, states[:, 0], self.unseen.conditions[rows], num_steps, known)
                error = (made - states[:, -1]).square().sum(dim=(1, 3, 4))[~known]
                squares, count = squares + float(error.sum()), count + error.numel() * made[0, :, 0].numel()
            figures[f"shortcut_{num_steps}_error"] = (squares / count) ** 0.5
        return figures

    @torch.no_grad()
    def show(self, average: nn.Module) -> dict[str, np.ndarray]:
        """Samples in the default number of steps, beside those of :class:`DenoiserTask` in many short ones."""
        shown = super().show(average)
        if self.autoencoder is None:
            return shown
        noise, condition = shown_noise(self.test)
        made = _sample(average, noise, condition, self.distillation.steps[0])
        return shown | named_videos("sample by shortcut", self.autoencoder.decode(made))


def _sample(
    network: nn.Module, noise: Tensor, condition: Tensor, num_steps: int, is_known: Tensor | None = None
) -> Tensor:
    def predict(x: Tensor, t: Any, step: Any) -> Tensor:
        return cast(Tensor, network(x, each_frame(t, x), condition, each_frame(step, x))).float()

    velocity: Callable[..., Tensor] = predict if is_known is None else held(predict, is_known)
    return sample(shortcut_steps(num_steps), velocity, noise)
