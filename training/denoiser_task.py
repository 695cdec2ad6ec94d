"""Training of the denoiser on cached latents: velocities, or noise with its variance; with or without alignment."""

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from medsora.diffusion.path import each_frame
from medsora.diffusion.samplers import SAMPLERS, sample
from medsora.models.autoencoder import VideoAutoencoder
from medsora.models.denoiser import Denoiser
from training.alignment import Alignment, alignment_weight
from training.config import TrainConfig
from training.data.clips import ClipSet, index_batches, sampling_weights
from training.data.latents import LatentSet
from training.distributed import Share
from training.errors import TrainingError
from training.objective import (
    DenoisingSample,
    draw_flow_sample,
    draw_noise_sample,
    flow_matching_loss,
    noise_prediction_loss,
)
from training.shown import named_videos, shown_noise

__all__ = ["DenoiserTask"]

EVALUATION_BATCH = 32
SHOWN_STEPS = 10
"""Sampling steps of the videos to look at."""


class DenoiserTask:
    """Predict velocities, or noise with its variance, on cached latents.

    Args:
        train, test: Latents on the training device.
        clips: Those that ``train`` was encoded from, to name windows; twice in it when mirrored ones follow.
        autoencoder: Decodes what is shown; nothing is shown without one.
        alignment: Of ``model`` with targets for ``train``; needed unless ``alignment.kind`` is none.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Denoiser,
        train: LatentSet,
        test: LatentSet,
        *,
        clips: ClipSet,
        autoencoder: VideoAutoencoder | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        if (alignment is None) != (config.alignment.kind == "none"):
            raise TrainingError(f"alignment.kind is {config.alignment.kind}, alignment is {alignment}")
        self.config, self._model, self.train, self.test, self.clips = config, model, train, test, clips
        self.autoencoder, self.alignment = autoencoder, alignment
        self._share = Share()
        self._weights = sampling_weights(train.conditions, config.data.sampling_exponent)

    @property
    def model(self) -> Denoiser:
        return self._model

    def auxiliary(self) -> dict[str, nn.Module]:
        return {} if self.alignment is None else self.alignment.modules()

    def take_share(self, share: Share) -> None:
        self._share = share

    def compile(self) -> None:
        # Block by block: all blocks share one graph, which takes a sixth of the time that the unrolled network
        # takes (docs/experiments.md).
        frames, height, width = self.train.latents.shape[2:]
        self._model.make_tables((frames, height, width), self.train.latents.device)
        for block in self._model.blocks:
            block.compile(dynamic=False)

    def _draw(self, generator: torch.Generator) -> Tensor:
        """Which windows the whole batch holds."""
        return torch.multinomial(self._weights, self.config.loop.batch_size, replacement=True, generator=generator)

    def describe(self, generator: torch.Generator) -> list[str]:
        windows = len(self.clips)
        return [
            self.clips.describe(index % windows) + (", mirrored" if index >= windows else "")
            for index in self._share.of(self._draw(generator)).tolist()
        ]

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        indices = self._draw(generator)
        settings = self.config.denoiser_loss
        drawn = self._sample(
            self.train, indices, generator, label_dropout=settings.label_dropout, clean_prefixes=settings.clean_prefixes
        ).map(self._share.of)
        loss, parts = self._loss_of(self._model, drawn)
        if self.alignment is not None:
            weight = alignment_weight(self.config.alignment, step)
            if weight > 0:
                parts["alignment"] = self.alignment.loss(self._share.of(indices), drawn.t, drawn.is_noisy)
                loss = loss + weight * parts["alignment"]
            else:
                self.alignment.forget()
        return loss, {name: part.detach() for name, part in parts.items()}

    def _sample(
        self,
        data: LatentSet,
        indices: Tensor,
        generator: torch.Generator,
        *,
        label_dropout: float,
        clean_prefixes: float,
    ) -> DenoisingSample:
        settings, null_condition = self.config.denoiser_loss, self._model.config.null_condition
        latents, condition = data.latents[indices].float(), data.conditions[indices]
        if self._model.config.prediction == "noise":
            return draw_noise_sample(
                latents, condition, null_condition=null_condition, label_dropout=label_dropout, generator=generator
            )
        return draw_flow_sample(
            latents,
            condition,
            null_condition=null_condition,
            time_mean=settings.time_mean,
            time_std=settings.time_std,
            label_dropout=label_dropout,
            clean_prefixes=clean_prefixes,
            generator=generator,
        )

    def _loss_of(self, network: nn.Module, drawn: DenoisingSample) -> tuple[Tensor, dict[str, Tensor]]:
        """What the network is trained for, and its parts."""
        prediction = cast(Tensor, network(drawn.noisy, drawn.t, drawn.condition))
        if self._model.config.prediction == "noise":
            error, bound = noise_prediction_loss(prediction, drawn)
            return error + bound, {"noise_mse": error, "variance_bound": bound}
        error = flow_matching_loss(prediction, drawn.target, drawn.is_noisy)
        return error, {"velocity_mse": error}

    @torch.no_grad()
    def evaluate(self, average: nn.Module) -> dict[str, float]:
        """Loss on both splits with the same noise and times every time it is asked; from noise, without prefixes."""
        return {
            f"{name}_{part}": value
            for name, latents in (("train", self.train), ("test", self.test))
            for part, value in self._fixed_loss(average, latents).items()
        }

    @torch.no_grad()
    def show(self, average: nn.Module) -> dict[str, np.ndarray]:
        """Samples in few steps, without guidance, for conditions of the test split and the same noise every time."""
        if self.autoencoder is None:
            return {}
        noise, condition = shown_noise(self.test)
        sampler = SAMPLERS["euler" if self._model.config.prediction == "velocity" else "ddim"]

        def predict(x: Tensor, t: float) -> Tensor:
            return cast(Tensor, average(x, each_frame(t, x), condition))

        return named_videos("sample", self.autoencoder.decode(sample(sampler.steps(SHOWN_STEPS), predict, noise)))

    def _fixed_loss(self, network: nn.Module, data: LatentSet) -> dict[str, float]:
        device = data.latents.device
        generator = torch.Generator(device).manual_seed(0)
        count = min(len(data), 256)
        # evenly over all windows: neighbours in the list are nearly the same clip
        indices = torch.linspace(0, len(data) - 1, count, device=device).long()
        sums: dict[str, Tensor] = {}
        for rows in index_batches(count, EVALUATION_BATCH, device):
            drawn = self._sample(data, indices[rows], generator, label_dropout=0.0, clean_prefixes=0.0)
            for part, value in self._loss_of(network, drawn)[1].items():
                sums[part] = sums.get(part, torch.zeros_like(value)) + value * len(rows)
        return {part: float(value / count) for part, value in sums.items()}
