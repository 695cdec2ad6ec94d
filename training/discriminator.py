"""Tells reconstructions from real videos, patch by patch: the adversarial term of the autoencoder, late in training.

Source: Isola et al., arXiv 1611.07004, section 3.2.2 (patches), in the form of VQ-GAN (Esser et al., arXiv 2012.09841),
which MedSora's figure names for its autoencoder; spectral norm instead of batch norm (Miyato et al., arXiv 1802.05957),
so that a score does not depend on the rest of the batch.
"""

from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

__all__ = ["PatchDiscriminator", "cut_runs", "scores_through_fixed_weights"]


class PatchDiscriminator(nn.Module):
    """2-D convolutions over a few consecutive frames stacked as channels, so that flicker shows as well as blur.

    A score sees 46 x 46 pixels.

    Args:
        num_frames: Of a run.
        channels: Width of the first layer.
    """

    def __init__(self, num_frames: int, channels: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        widths = (3 * num_frames, channels, 2 * channels, 4 * channels)
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(narrow, wide, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        layers.append(spectral_norm(nn.Conv2d(widths[-1], 1, 4, padding=1)))
        self.layers = nn.Sequential(*layers)

    def forward(self, runs: Float[Tensor, "b 3 f h w"]) -> Float[Tensor, "b 1 hh ww"]:
        """Scores of patches: high for real ones."""
        stacked = rearrange(runs.float(), "b c f h w -> b (f c) h w")
        # the spectral norm is found by products of matrix and vector, which 8 bits of mantissa would spoil
        with torch.autocast(runs.device.type, enabled=False):
            scores: Tensor = self.layers(stacked)
        return scores


def scores_through_fixed_weights(
    discriminator: PatchDiscriminator, runs: Float[Tensor, "b 3 f h w"]
) -> Float[Tensor, "b 1 hh ww"]:
    """Scores whose gradient goes to the videos and not to the discriminator."""
    weights = {name: value.detach() for name, value in discriminator.named_parameters()}
    scores: Tensor = functional_call(discriminator, weights, (runs,))
    return scores


def cut_runs(
    video: Float[Tensor, "b c f h w"], starts: Int[Tensor, " b"], num_frames: int
) -> Float[Tensor, "b c n h w"]:
    """``num_frames`` consecutive frames of each clip, from its own start on."""
    frames = starts[:, None] + torch.arange(num_frames, device=starts.device)
    rows = torch.arange(len(video), device=starts.device)[:, None]
    chosen: Tensor = rearrange(video, "b c f h w -> b f c h w")[rows, frames]
    return rearrange(chosen, "b n c h w -> b c n h w")
