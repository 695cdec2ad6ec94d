"""How differently two frames look: the perceptual term of the autoencoder, by LPIPS or by SqueezeNet features."""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from training.lpips import Lpips, load_lpips
from training.objective import perceptual_distance
from training.squeezenet import SqueezeNet, load_squeezenet

__all__ = ["FrameDistance", "load_distance", "lpips_distance", "squeezenet_distance"]

FrameDistance = Callable[[Tensor, Tensor], Tensor]
"""(reconstructed frames, frames), both (n 3 h w) RGB in [-1, 1], to their mean distance; the gradient goes to the
first alone."""


def squeezenet_distance(network: SqueezeNet) -> FrameDistance:
    """Distance of unit-length SqueezeNet features, all channels alike. It is not LPIPS."""

    def distance(frames: Float[Tensor, "n 3 h w"], target: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
        with torch.no_grad():
            wanted = network.taps(target)
        return perceptual_distance(network.taps(frames), wanted)

    return distance


def lpips_distance(network: Lpips) -> FrameDistance:
    """LPIPS, mean over frames."""

    def distance(frames: Float[Tensor, "n 3 h w"], target: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
        of_frames: Tensor = network(frames, target.detach())
        return of_frames.mean()

    return distance


def load_distance(
    *,
    squeezenet: Path | None = None,
    lpips: Path | None = None,
    lpips_backbone: Path | None = None,
    device: torch.device | str = "cpu",
) -> FrameDistance | None:
    """The distance whose weights are named: LPIPS before SqueezeNet, None where there is neither.

    Raises:
        TrainingError: A file is not usable.
    """
    if lpips is not None:
        return lpips_distance(load_lpips(lpips, backbone=lpips_backbone, device=device))
    if squeezenet is not None:
        return squeezenet_distance(load_squeezenet(squeezenet, device=device))
    return None
