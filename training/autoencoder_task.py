"""Training of the autoencoder: reconstruct windows of pixels.

Terms: L1 and squared error, perceptual distance, focal frequency, divergence of the latents, and late in training what
a discriminator says.
"""

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from medsora.geometry import latent_shape
from medsora.models.autoencoder import VideoAutoencoder
from medsora.video_io import from_uint8
from training.config import AutoencoderLossConfig, TrainConfig
from training.data.clips import ClipSet, sampling_weights
from training.discriminator import PatchDiscriminator, cut_runs, scores_through_fixed_weights
from training.distributed import Share
from training.errors import TrainingError
from training.metrics import Reconstruction, measure_reconstruction
from training.objective import (
    adversarial_loss,
    discriminator_loss,
    focal_frequency_loss,
    kl_divergence,
    sample_posterior,
)
from training.perceptual import FrameDistance
from training.shown import named_videos, spread_windows

__all__ = ["AutoencoderTask", "adversarial_weight", "draw_starts", "reconstruct"]

EVALUATION_BATCH = 32


def adversarial_weight(config: AutoencoderLossConfig, step: int) -> float:
    """Weight of the adversarial term at a step: 0 until it starts, then rising to the full one."""
    since = step - config.adversarial_start_step
    return config.adversarial * min(1.0, max(0.0, since / max(1, config.adversarial_ramp_steps)))


def draw_starts(count: int, length: int, num_frames: int, generator: torch.Generator) -> Tensor:
    """Where runs of ``length`` frames begin, so that no frame is seen less often than those in the middle.

    Starts beyond both ends are drawn too, and moved to them: else the first frame and the last would be in one run
    where those between are in ``length``, and come out smoother than they are.
    """
    drawn = torch.randint(1 - length, num_frames, (count,), generator=generator, device=generator.device)
    return drawn.clamp(0, num_frames - length)


class AutoencoderModule(nn.Module):
    """The autoencoder's training pass as one module, so that it compiles as one graph."""

    def __init__(self, autoencoder: VideoAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.autoencoder.posterior(video)
        z = sample_posterior(mean.float(), logvar.float(), noise)
        return self.autoencoder.decode_z(z), mean, logvar


class AutoencoderTask:
    """Reconstruct windows of pixels.

    Args:
        perceptual: Needed unless ``autoencoder_loss.perceptual`` is 0.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: VideoAutoencoder,
        train: ClipSet,
        test: ClipSet,
        perceptual: FrameDistance | None,
    ) -> None:
        weights = config.autoencoder_loss
        if weights.perceptual > 0 and perceptual is None:
            raise TrainingError(
                "autoencoder_loss.perceptual is above 0: name the weights with --squeezenet or --lpips, "
                "or set autoencoder_loss.perceptual=0"
            )
        self.config, self._model, self.train, self.test, self.perceptual = config, model, train, test, perceptual
        self.discriminator = (
            PatchDiscriminator(
                min(weights.discriminator_frames, config.data.num_frames), weights.discriminator_channels
            ).to(model.latent_mean.device)
            if weights.adversarial > 0
            else None
        )
        self._forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = AutoencoderModule(model)
        self._share = Share()
        self._weights = sampling_weights(train.conditions, config.data.sampling_exponent)

    @property
    def model(self) -> VideoAutoencoder:
        return self._model

    def auxiliary(self) -> dict[str, nn.Module]:
        return {} if self.discriminator is None else {"discriminator": self.discriminator}

    def take_share(self, share: Share) -> None:
        self._share = share

    def compile(self) -> None:
        self._forward = torch.compile(AutoencoderModule(self.model), dynamic=False)

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
        total = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum()
        if self.perceptual is not None and weights.perceptual > 0:
            parts["perceptual"] = self._perceptual(self.perceptual, reconstruction, video, generator)
            total = total + weights.perceptual * parts["perceptual"]
        if self.discriminator is not None and step >= weights.adversarial_start_step:
            ours, its = self._adversarial(self.discriminator, reconstruction, video, generator)
            total = total + adversarial_weight(weights, step) * ours + its
            parts |= {"adversarial": ours, "discriminator": its}
        return total, {name: part.detach() for name, part in parts.items()}

    def _latent_shape(self, video: Tensor) -> tuple[int, ...]:
        return (len(video), self.model.config.latent_channels, *latent_shape(*video.shape[2:]))

    def _perceptual(
        self, distance: FrameDistance, reconstruction: Tensor, video: Tensor, generator: torch.Generator
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

        return distance(frames(reconstruction), frames(video))

    def _adversarial(
        self, discriminator: PatchDiscriminator, reconstruction: Tensor, video: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """What the autoencoder and the discriminator minimise, on some consecutive frames of every clip."""
        starts = self._share.of(
            draw_starts(self.config.loop.batch_size, discriminator.num_frames, video.shape[2], generator)
        )
        real, coded = (cut_runs(clips, starts, discriminator.num_frames) for clips in (video, reconstruction))
        its = discriminator_loss(discriminator(real), discriminator(coded.detach()))
        return adversarial_loss(scores_through_fixed_weights(discriminator, coded)), its

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
        indices = spread_windows(len(self.test), self.test.frames.device)
        video = from_uint8(self.test.gather(indices, torch.zeros_like(indices, dtype=torch.bool)))
        pairs = torch.cat([video, autoencoder.decode(autoencoder.encode(video))], dim=-1)
        return named_videos("real and reconstructed", pairs)


def reconstruct(autoencoder: VideoAutoencoder, clips: ClipSet) -> Reconstruction:
    """Encode and decode every window of ``clips`` and compare.

    Args:
        autoencoder: In evaluation mode.
    """
    dtype = autoencoder.latent_mean.dtype
    return measure_reconstruction(
        lambda video: autoencoder.decode(autoencoder.encode(video.to(dtype))), clips, batch_size=EVALUATION_BATCH
    )
