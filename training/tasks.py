"""The two things the loop can train: the autoencoder on pixels, the denoiser on cached latents.

A task owns its network, its data on the device and its loss; :mod:`training.trainer` knows nothing of either.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from training.autoencoder_task import AutoencoderTask, reconstruct
from training.denoiser_task import DenoiserTask
from training.distributed import Share

__all__ = ["AutoencoderTask", "DenoiserTask", "Task", "reconstruct"]


class Task(Protocol):
    """What the training loop asks of a task."""

    @property
    def model(self) -> nn.Module:
        """The network whose parameters are trained."""

    def auxiliary(self) -> dict[str, nn.Module]:
        """Networks trained beside the model, by name: a projector, a discriminator; empty for none.

        Each has an optimizer of its own that descends the same loss. A discriminator therefore adds its own term
        to the loss, on detached videos, and the model's adversarial term goes through detached weights of the
        discriminator. They are saved and resumed, but neither averaged nor exported.
        """

    def take_share(self, share: Share) -> None:
        """From now on compute the loss of this process's share of each batch only."""

    def compile(self) -> None:
        """Compile the network's forward pass from now on."""

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw a batch, return the loss to minimise and its parts (detached) for the log.

        The whole batch is drawn whatever the share, so that it is the same one for any number of processes; the
        loss is a mean over clips, so that the mean of the shares' losses is the batch's.

        Args:
            step: Steps done before this one.
        """

    def describe(self, generator: torch.Generator) -> list[str]:
        """Say which clips and frames this process's share holds of the batch that :meth:`loss` draws."""

    def evaluate(self, average: nn.Module) -> dict[str, float]:
        """Figures of the averaged network on the test split."""

    def show(self, average: nn.Module) -> dict[str, np.ndarray]:
        """A few videos of the averaged network to look at, by name: (f, h, w, 3) uint8; the same clips every time."""
