"""The two things the loop can train: the autoencoder on pixels, the denoiser on cached latents.

A task owns its network, its data on the device and its loss; :mod:`training.trainer` knows nothing of either.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from medsora.diffusion.samplers import SAMPLERS, sample
from medsora.geometry import latent_shape
from medsora.models.autoencoder import VideoAutoencoder
from medsora.models.denoiser import Denoiser
from medsora.video_io import from_uint8, to_uint8
from training.config import TrainConfig
from training.data.clips import ClipSet, index_batches, sampling_weights
from training.data.latents import LatentSet
from training.distributed import Share
from training.errors import TrainingError
from training.metrics import Reconstruction, measure_reconstruction
from training.objective import (
    draw_flow_sample,
    flow_matching_loss,
    focal_frequency_loss,
    kl_divergence,
    perceptual_distance,
    sample_posterior,
)
from training.squeezenet import SqueezeNet

__all__ = ["AutoencoderTask", "DenoiserTask", "Task", "reconstruct"]

Forward = Callable[..., Tensor | tuple[Tensor, ...]]
EVALUATION_BATCH = 32
SHOWN_CLIPS, SHOWN_STEPS = 4, 10
"""Videos to look at during training, and sampling steps for those of a denoiser."""


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


class AutoencoderModule(nn.Module):
    """The autoencoder's training pass as one module, so that it compiles as one graph."""

    def __init__(self, autoencoder: VideoAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.autoencoder.posterior(video)
        z = sample_posterior(mean.float(), logvar.float(), noise)
        return self.autoencoder.decode_z(z), mean, logvar


@dataclass
class AutoencoderTask:
    """Reconstruct windows of pixels."""

    config: TrainConfig
    model: VideoAutoencoder
    train: ClipSet
    test: ClipSet
    squeezenet: SqueezeNet | None
    """Needed unless ``autoencoder_loss.perceptual`` is 0."""

    def __post_init__(self) -> None:
        if self.config.autoencoder_loss.perceptual > 0 and self.squeezenet is None:
            raise TrainingError(
                "autoencoder_loss.perceptual is above 0: name the SqueezeNet weights with --squeezenet, "
                "or set autoencoder_loss.perceptual=0"
            )
        self._forward: Forward = AutoencoderModule(self.model)
        self._share = Share()
        self._weights = sampling_weights(self.train.conditions, self.config.data.sampling_exponent)

    def auxiliary(self) -> dict[str, nn.Module]:
        return {}

    def take_share(self, share: Share) -> None:
        self._share = share

    def compile(self) -> None:
        self._forward = cast(Forward, torch.compile(AutoencoderModule(self.model), dynamic=False))

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which windows the whole batch holds, and which of them are mirrored."""
        size = self.config.loop.batch_size
        indices = torch.multinomial(self._weights, size, replacement=True, generator=generator)
        flips = torch.rand(size, generator=generator, device=generator.device) < (0.5 * self.config.data.has_flips)
        return indices, flips

    def describe(self, generator: torch.Generator) -> list[str]:
        indices, flips = (self._share.of(drawn).tolist() for drawn in self._draw(generator))
        return [
            self.train.describe(index) + (", mirrored" if is_flipped else "")
            for index, is_flipped in zip(indices, flips, strict=True)
        ]

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.config.autoencoder_loss
        indices, flips = self._draw(generator)
        video = from_uint8(self.train.gather(self._share.of(indices), self._share.of(flips)))
        shape = (self.config.loop.batch_size, *self._latent_shape(video)[1:])
        noise = self._share.of(torch.randn(shape, generator=generator, device=generator.device))
        reconstruction, mean, logvar = self._forward(video, noise)
        reconstruction = reconstruction.float()
        parts = {
            "l1": F.l1_loss(reconstruction, video),
            "mse": F.mse_loss(reconstruction, video),
            "focal_frequency": focal_frequency_loss(reconstruction, video),
            "kl": kl_divergence(mean, logvar),
        }
        if self.squeezenet is not None and weights.perceptual > 0:
            parts["perceptual"] = self._perceptual(self.squeezenet, reconstruction, video, generator)
        total = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    def _latent_shape(self, video: Tensor) -> tuple[int, ...]:
        return (len(video), self.model.config.latent_channels, *latent_shape(*video.shape[2:]))

    def _perceptual(
        self, network: SqueezeNet, reconstruction: Tensor, video: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Perceptual distance of some frames of every clip."""
        b, _, f, _, _ = video.shape
        count = min(self.config.autoencoder_loss.perceptual_frames, f)
        draws = torch.rand(self.config.loop.batch_size, f, generator=generator, device=generator.device)
        order = self._share.of(draws).argsort(dim=1)[:, :count]
        rows = torch.arange(b, device=video.device)[:, None]

        def frames(clip: Tensor) -> Tensor:
            chosen = rearrange(clip, "b c f h w -> b f c h w")[rows, order]
            return rearrange(chosen, "b n c h w -> (b n) c h w").contiguous(memory_format=torch.channels_last)

        with torch.no_grad():
            target = network.taps(frames(video))
        return perceptual_distance(network.taps(frames(reconstruction)), target)

    def evaluate(self, average: nn.Module) -> dict[str, float]:
        autoencoder = cast(VideoAutoencoder, average)
        result = reconstruct(autoencoder, self.test)
        return {
            "psnr_db": result.psnr_db,
            "ssim": result.ssim,
            "high_frequency_ratio": result.high_frequency_ratio,
        }

    @torch.no_grad()
    def show(self, average: nn.Module) -> dict[str, np.ndarray]:
        """Windows of the test split, each beside its reconstruction."""
        autoencoder = cast(VideoAutoencoder, average)
        indices = _spread(len(self.test), self.test.frames.device)
        video = from_uint8(self.test.gather(indices, torch.zeros_like(indices, dtype=torch.bool)))
        pairs = torch.cat([video, autoencoder.decode(autoencoder.encode(video))], dim=-1)
        return _named_videos("real and reconstructed", pairs)


def reconstruct(autoencoder: VideoAutoencoder, clips: ClipSet) -> Reconstruction:
    """Encode and decode every window of ``clips`` and compare.

    Args:
        autoencoder: In evaluation mode.
    """
    dtype = autoencoder.latent_mean.dtype
    return measure_reconstruction(
        lambda video: autoencoder.decode(autoencoder.encode(video.to(dtype))), clips, batch_size=EVALUATION_BATCH
    )


def _spread(count: int, device: torch.device) -> Tensor:
    """Indices of a few windows far apart: neighbours in the list are nearly the same clip."""
    return torch.linspace(0, count - 1, min(count, SHOWN_CLIPS), device=device).long()


def _named_videos(name: str, videos: Tensor) -> dict[str, np.ndarray]:
    """Videos (b c f h w) in [-1, 1] as :meth:`Task.show` gives them."""
    return {f"{name} {number}": frames.cpu().numpy() for number, frames in enumerate(to_uint8(videos))}


class DenoiserTask:
    """Predict velocities on cached latents.

    Args:
        train, test: Latents on the training device.
        clips: Those that ``train`` was encoded from, to name windows; twice in it when mirrored ones follow.
        autoencoder: Decodes what is shown; nothing is shown without one.
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
    ) -> None:
        self.config, self._model, self.train, self.test, self.clips = config, model, train, test, clips
        self.autoencoder = autoencoder
        self._forward: Forward = model
        self._share = Share()
        self._weights = sampling_weights(train.conditions, config.data.sampling_exponent)

    @property
    def model(self) -> Denoiser:
        return self._model

    def auxiliary(self) -> dict[str, nn.Module]:
        return {}

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
        settings = self.config.denoiser_loss
        indices = self._draw(generator)
        sample = draw_flow_sample(
            self.train.latents[indices].float(),
            self.train.conditions[indices],
            null_condition=self._model.config.null_condition,
            time_mean=settings.time_mean,
            time_std=settings.time_std,
            label_dropout=settings.label_dropout,
            generator=generator,
        )
        noisy, t, condition = (self._share.of(drawn) for drawn in (sample.noisy, sample.t, sample.condition))
        velocity = cast(Tensor, self._forward(noisy, t, condition))
        loss = flow_matching_loss(velocity, self._share.of(sample.target))
        return loss, {"velocity_mse": loss.detach()}

    @torch.no_grad()
    def evaluate(self, average: nn.Module) -> dict[str, float]:
        """Loss on both splits with the same noise and times every time it is asked."""
        return {
            f"{name}_velocity_mse": self._fixed_loss(average, latents)
            for name, latents in (("train", self.train), ("test", self.test))
        }

    @torch.no_grad()
    def show(self, average: nn.Module) -> dict[str, np.ndarray]:
        """Samples in few steps, without guidance, for conditions of the test split and the same noise every time."""
        if self.autoencoder is None:
            return {}
        latents, device = self.test.latents, self.test.latents.device
        condition = self.test.conditions[_spread(len(self.test), device)]
        generator = torch.Generator(device).manual_seed(0)
        noise = torch.randn(len(condition), *latents.shape[1:], generator=generator, device=device)
        sampler = SAMPLERS["euler" if self._model.config.prediction == "velocity" else "ddim"]

        def predict(x: Tensor, t: float) -> Tensor:
            return cast(Tensor, average(x, torch.full((len(x), x.shape[2]), float(t), device=device), condition))

        return _named_videos("sample", self.autoencoder.decode(sample(sampler.steps(SHOWN_STEPS), predict, noise)))

    def _fixed_loss(self, network: nn.Module, data: LatentSet) -> float:
        settings, device = self.config.denoiser_loss, data.latents.device
        generator = torch.Generator(device).manual_seed(0)
        count = min(len(data), 256)
        # evenly over all windows: neighbours in the list are nearly the same clip
        indices = torch.linspace(0, len(data) - 1, count, device=device).long()
        losses = []
        for rows in index_batches(count, EVALUATION_BATCH, device):
            part = indices[rows]
            sample = draw_flow_sample(
                data.latents[part].float(),
                data.conditions[part],
                null_condition=self._model.config.null_condition,
                time_mean=settings.time_mean,
                time_std=settings.time_std,
                label_dropout=0.0,
                generator=generator,
            )
            velocity = network(sample.noisy, sample.t, sample.condition)
            losses.append(flow_matching_loss(velocity, sample.target) * len(part))
        return float(torch.stack(losses).sum() / count)
