"""Frozen networks that see flow drawn as colour: the targets of the paper's alignment."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from training.errors import TrainingError
from training.evaluation.torchscript import load_torchscript
from training.squeezenet import SqueezeNet

__all__ = ["ImageFeatures", "load_dino", "squeezenet_features"]

ImageFeatures = Callable[[Tensor], list[Tensor]]
"""RGB images (n 3 h w) in [0, 1] to what each layer makes of them, from first to last: (n c hh ww)."""
RGB_MEAN, RGB_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_dino(path: Path, *, device: torch.device | str = "cpu") -> ImageFeatures:
    """A vision transformer such as DINO ViT-S/8, as TorchScript.

    Args:
        path: Takes images (n 3 h w) of ImageNet's mean and deviation; gives a list with one tensor (n tokens channels)
            a layer, or all of them stacked, tokens row by row without the class token.

    Raises:
        TrainingError: No such file, or no TorchScript; when used, other shapes than these.
    """
    network = load_torchscript(path, device=device)
    mean, deviation = (torch.tensor(values, device=device)[:, None, None] for values in (RGB_MEAN, RGB_DEVIATION))

    @torch.no_grad()
    def features(images: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n c hh ww"]]:
        found = network((images - mean) / deviation)
        layers = list(found) if isinstance(found, list | tuple) else list(found.unbind())
        return [_as_map(layer, images, path) for layer in layers]

    return features


def _as_map(tokens: Tensor, images: Tensor, path: Path) -> Tensor:
    """Tokens row by row as a map of the image's proportions."""
    height, width = images.shape[2:]
    if tokens.dim() == 3 and len(tokens) == len(images):
        rows = math.isqrt(tokens.shape[1] * height // width)
        if rows >= 1 and rows * rows * width == tokens.shape[1] * height:
            return rearrange(tokens, "n (h w) c -> n c h w", h=rows)
    raise TrainingError(
        f"{path} gives a layer of shape {tuple(tokens.shape)} for {len(images)} images of {width}x{height}: "
        "it must be (images, tokens, channels), tokens row by row, without the class token"
    )


def squeezenet_features(network: SqueezeNet) -> ImageFeatures:
    """SqueezeNet's Fire modules, where there is no DINO: a stand-in, not what the paper used."""

    @torch.no_grad()
    def features(images: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n c hh ww"]]:
        found = network.layers(images * 2.0 - 1.0)
        return [layer for name, layer in found.items() if name.startswith("fire")]

    return features
