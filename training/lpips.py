"""LPIPS: a perceptual distance with learned weights, from files that the caller names.

Source: Zhang et al., arXiv 1801.03924, equation 1. Layout of the files: the state of the lpips package's network
(``net.slice1.0.weight`` ... ``lin4.model.1.weight``) as one file; or the weights that the package publishes
(``lin0.model.1.weight`` ...) with the backbone's file as torchvision names it (``features.0.weight`` ...).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from training.errors import TrainingError
from training.weights import read_weights

__all__ = ["BACKBONES", "Lpips", "load_lpips"]

RGB_MEAN, RGB_DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's colours on the scale [-1, 1], as the published weights were made with."""


@dataclass(frozen=True)
class Convolution:
    """One layer of a backbone, followed by a ReLU."""

    index: int
    """Number in torchvision's ``features``."""
    channels: int
    size: int = 3
    stride: int = 1
    pool: int = 0
    """Side of the max pooling before it (its stride is 2); 0 for none."""
    is_tap: bool = True
    """Whether LPIPS compares what comes out here."""


# fmt: off
BACKBONES: dict[str, tuple[Convolution, ...]] = {
    "alex": (
        Convolution(0, 64, size=11, stride=4), Convolution(3, 192, size=5, pool=3), Convolution(6, 384, pool=3),
        Convolution(8, 256), Convolution(10, 256),
    ),
    "vgg": (
        Convolution(0, 64, is_tap=False), Convolution(2, 64),
        Convolution(5, 128, pool=2, is_tap=False), Convolution(7, 128),
        Convolution(10, 256, pool=2, is_tap=False), Convolution(12, 256, is_tap=False), Convolution(14, 256),
        Convolution(17, 512, pool=2, is_tap=False), Convolution(19, 512, is_tap=False), Convolution(21, 512),
        Convolution(24, 512, pool=2, is_tap=False), Convolution(26, 512, is_tap=False), Convolution(28, 512),
    ),
}
# fmt: on
PADDING = {11: 2, 5: 2, 3: 1}


class Lpips(nn.Module):
    """The distance; always in evaluation mode, never trained.

    Args:
        backbone: ``alex`` or ``vgg`` (VGG-16).
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.backbone, self._layers = backbone, BACKBONES[backbone]
        self.features, channels = nn.ModuleDict(), 3
        for layer in self._layers:
            self.features[str(layer.index)] = nn.Conv2d(
                channels, layer.channels, layer.size, stride=layer.stride, padding=PADDING[layer.size]
            )
            channels = layer.channels
        taps = [layer.channels for layer in self._layers if layer.is_tap]
        self.weights = nn.ParameterList(torch.empty(1, count, 1, 1) for count in taps)
        self.register_buffer("mean", torch.tensor(RGB_MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(RGB_DEVIATION)[:, None, None], persistent=False)

    def taps(self, frames: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n c hh ww"]]:
        """Features from fine to coarse, each pixel's of unit length.

        Args:
            frames: RGB in [-1, 1], at least 32x32; used at their own size.
        """
        x, found = (frames - self.mean) / self.deviation, []
        for layer in self._layers:
            if layer.pool:
                x = F.max_pool2d(x, layer.pool, stride=2)
            x = F.relu(self.features[str(layer.index)](x))
            if layer.is_tap:
                found.append(F.normalize(x.float(), dim=1, eps=1e-10))
        return found

    def forward(self, frames: Float[Tensor, "n 3 h w"], other: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """Distance of each pair: sum over layers of the weighted squared difference, mean over pixels."""
        terms = [
            ((a - b).square() * weight).sum(dim=1).mean(dim=(1, 2))
            for a, b, weight in zip(self.taps(frames), self.taps(other), self.weights, strict=True)
        ]
        return torch.stack(terms).sum(dim=0)


def load_lpips(path: Path, *, backbone: Path | None = None, device: torch.device | str = "cpu") -> Lpips:
    """Build the distance from weight files, frozen; whether AlexNet or VGG-16 is seen from the shapes.

    Args:
        path: State of the whole network, or of the learned weights alone. ``.safetensors``, or a torch file that holds
            nothing but tensors.
        backbone: The ImageNet network, when ``path`` holds the learned weights alone; its classifier is not used.

    Raises:
        TrainingError: No such file, unreadable, or other names or shapes.
    """
    found = read_weights(path, "LPIPS") | ({} if backbone is None else read_weights(backbone, "LPIPS backbone"))
    weights: dict[str, Tensor] = {}
    for name, value in found.items():
        parts = name.split(".")
        if parts[0].startswith("lin") and parts[0][3:].isdigit():  # "lins.0..." repeats them
            weights[f"weights.{parts[0][3:]}"] = value
        elif parts[0] == "net" and parts[1].startswith("slice"):
            weights[".".join(("features", *parts[2:]))] = value
        elif parts[0] == "features":
            weights[name] = value
    learned = weights.get("weights.0")
    if learned is None or "features.0.weight" not in weights:
        missing = "learned weights (lin0.model.1.weight)" if learned is None else "backbone"
        raise TrainingError(
            f"{path} has no {missing}: LPIPS needs the state of the whole network, or that of its learned weights and "
            "--lpips-backbone with torchvision's AlexNet or VGG-16"
        )
    network = Lpips("alex" if weights["features.0.weight"].shape[-1] == 11 else "vgg")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainingError(f"{path} holds no LPIPS with {network.backbone}: {error}") from error
    return network.to(device).eval().requires_grad_(False)
