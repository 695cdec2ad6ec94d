"""Encodes every window once, so that denoiser training never touches pixels.

The causal autoencoder codes a window by its own frames alone, so each window (and its mirror image) is coded
by itself. 15,000 windows of 16x4x16x16 float16 are 0.5 GB and stay on the training device.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medsora.models.autoencoder import VideoAutoencoder
from medsora.video_io import from_uint8
from training.data.clips import ClipSet, index_batches
from training.data.tensor_file import keep_tensors, kept_tensors

__all__ = ["LatentSet", "encode_windows", "latent_statistics", "load_or_encode"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentSet:
    """Normalised latents of windows, with their conditions."""

    latents: Tensor
    """(windows, c, f, h, w) float16."""
    conditions: Tensor
    """(windows, conditions) int64."""

    def __len__(self) -> int:
        return int(self.latents.shape[0])


@torch.no_grad()
def latent_statistics(autoencoder: VideoAutoencoder, clips: ClipSet, *, batch_size: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of ``z`` (posterior mean) over all windows.

    Args:
        autoencoder: In evaluation mode.

    Returns:
        Two float32 tensors (channels,).
    """
    total = torch.zeros(autoencoder.config.latent_channels, dtype=torch.float64, device=clips.frames.device)
    squares, count = torch.zeros_like(total), 0
    for indices in index_batches(len(clips), batch_size, clips.frames.device):
        windows = clips.gather(indices, torch.zeros_like(indices, dtype=torch.bool))
        mean, _ = autoencoder.posterior(from_uint8(windows))
        mean = mean.double()
        total += mean.sum(dim=(0, 2, 3, 4))
        squares += mean.square().sum(dim=(0, 2, 3, 4))
        count += mean[:, 0].numel()
    average = total / count
    variance = (squares / count - average.square()).clamp_min(1e-12)
    return average.float(), variance.sqrt().float()


@torch.no_grad()
def encode_windows(autoencoder: VideoAutoencoder, clips: ClipSet, *, has_flips: bool, batch_size: int) -> LatentSet:
    """Encode all windows, and all mirrored windows after them when ``has_flips``.

    Args:
        autoencoder: In evaluation mode, with its latent statistics set.
    """
    parts, conditions = [], []
    for is_flipped in (False, True) if has_flips else (False,):
        for indices in index_batches(len(clips), batch_size, clips.frames.device):
            windows = clips.gather(indices, torch.full_like(indices, is_flipped, dtype=torch.bool))
            parts.append(autoencoder.encode(from_uint8(windows)).to(torch.float16))
        conditions.append(clips.conditions)
    return LatentSet(latents=torch.cat(parts), conditions=torch.cat(conditions))


def load_or_encode(
    path: Path, *, key: str, autoencoder: VideoAutoencoder, clips: ClipSet, has_flips: bool, batch_size: int
) -> LatentSet:
    """Latents from a cache file, or encoded now and written there.

    Args:
        path: Cache file (safetensors); written under a temporary name and renamed.
        key: Says what the latents were made from (hash of autoencoder, data settings and clips); a file
            with another key is replaced.
    """
    kept = kept_tensors(path, key=key, device=clips.frames.device)
    if kept is not None:
        return LatentSet(latents=kept["latents"], conditions=kept["conditions"])
    made = encode_windows(autoencoder, clips, has_flips=has_flips, batch_size=batch_size)
    keep_tensors(path, {"latents": made.latents, "conditions": made.conditions}, key=key)
    return made
