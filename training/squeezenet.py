"""SqueezeNet 1.0, ImageNet weights in Caffe's layer names, as a frozen feature network.

Stands in for the backbones of LPIPS and of FVD or FID: distances in its features are never called by those
names. Architecture: Iandola et al., arXiv 1602.07360, table 1. The weights are a file that the caller names.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from training.errors import TrainingError
from training.weights import read_weights

__all__ = ["FEATURE_SIZE", "SqueezeNet", "load_squeezenet"]

FIRES = {  # input, squeeze, each of the two expand branches
    "fire2": (96, 16, 64), "fire3": (128, 16, 64), "fire4": (128, 32, 128), "fire5": (256, 32, 128),
    "fire6": (256, 48, 192), "fire7": (384, 48, 192), "fire8": (384, 64, 256), "fire9": (512, 64, 256),
}  # fmt: skip
FEATURE_SIZE = 512
"""Channels of the last Fire module, which :meth:`SqueezeNet.pooled` averages over the image."""
BGR_MEAN = (104.0, 117.0, 123.0)


class Fire(nn.Module):
    """1x1 squeeze, then 1x1 and 3x3 expansions side by side, ReLU after each."""

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.conv1x1_1 = nn.Conv2d(in_channels, squeeze, 1)
        self.conv1x1_2 = nn.Conv2d(squeeze, expand, 1)
        self.conv3x3_2 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1x1_1(x))
        return F.relu(torch.cat([self.conv1x1_2(x), self.conv3x3_2(x)], dim=1))


class SqueezeNet(nn.Module):
    """The convolutional part and the classifier; always in evaluation mode, never trained."""

    bgr_mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, stride=2)
        self.fires = nn.ModuleDict({name: Fire(*sizes) for name, sizes in FIRES.items()})
        self.conv_final = nn.Conv2d(512, 1000, 1)
        self.register_buffer("bgr_mean", torch.tensor(BGR_MEAN)[:, None, None], persistent=False)

    def layers(self, frames: Float[Tensor, "n 3 h w"]) -> dict[str, Float[Tensor, "n c hh ww"]]:
        """Features after the first convolution and after every Fire module.

        Args:
            frames: RGB in [-1, 1], at least 32x32; used at their own size.
        """
        x = (frames.flip(1) + 1.0) * 127.5 - self.bgr_mean
        x = F.relu(self.conv1(x))
        found = {"conv1": x}
        x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        for name, fire in self.fires.items():
            x = found[name] = fire(x)
            if name in ("fire4", "fire8"):
                x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        return found

    def taps(self, frames: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n c hh ww"]]:
        """Features from fine to coarse for the perceptual distance: conv1, fire3, fire5, fire7, fire9."""
        found = self.layers(frames)
        return [found[name] for name in ("conv1", "fire3", "fire5", "fire7", "fire9")]

    def pooled(self, frames: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Mean over the image of the last Fire module: 512 numbers a frame."""
        return self.layers(frames)["fire9"].mean(dim=(2, 3))

    def forward(self, frames: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k"]:
        """ImageNet class logits: used only to check that weights and input convention belong together."""
        return F.relu(self.conv_final(self.layers(frames)["fire9"])).mean(dim=(2, 3))


def load_squeezenet(path: Path, *, device: torch.device | str = "cpu") -> SqueezeNet:
    """Build the network from a weight file, frozen.

    Args:
        path: ``.safetensors``, or a torch file that holds nothing but tensors, keys as in Caffe's model
            (``fire2/conv1x1_1.weight``).

    Raises:
        TrainingError: No such file, unreadable, or other keys or shapes than SqueezeNet 1.0's.
    """
    weights = read_weights(path, "SqueezeNet")
    network = SqueezeNet()
    renamed = {
        f"fires.{key.replace('/', '.')}" if key.startswith("fire") else key: value for key, value in weights.items()
    }
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        raise TrainingError(f"{path} holds no SqueezeNet 1.0 in Caffe's layer names: {error}") from error
    return network.to(device).eval().requires_grad_(False)
