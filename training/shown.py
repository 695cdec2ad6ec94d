"""Videos to look at during training."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from medsora.video_io import to_uint8
from training.data.latents import LatentSet

__all__ = ["named_videos", "shown_noise", "spread_windows"]

SHOWN_CLIPS = 4


def spread_windows(count: int, device: torch.device) -> Int[Tensor, " n"]:
    """Indices of a few windows far apart: neighbours in the list are nearly the same clip."""
    return torch.linspace(0, count - 1, min(count, SHOWN_CLIPS), device=device).long()


def shown_noise(test: LatentSet) -> tuple[Float[Tensor, "b c f h w"], Int[Tensor, "b k"]]:
    """Noise, the same every time, and conditions of windows far apart: what the videos of a denoiser begin with."""
    latents, device = test.latents, test.latents.device
    condition = test.conditions[spread_windows(len(test), device)]
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(len(condition), *latents.shape[1:], generator=generator, device=device), condition


def named_videos(name: str, videos: Float[Tensor, "b c f h w"]) -> dict[str, np.ndarray]:
    """Videos in [-1, 1] as :meth:`training.tasks.Task.show` gives them."""
    return {f"{name} {number}": frames.cpu().numpy() for number, frames in enumerate(to_uint8(videos))}
