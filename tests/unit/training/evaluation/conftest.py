"""Small TorchScript networks of the published ones' signatures, and a way to write them."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn


class TinyI3d(nn.Module):
    """Signature of StyleGAN-V's I3D; its features tell what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mix", torch.randn(6, 5))

    def forward(
        self, x: Tensor, return_features: bool = False, use_fp16: bool = False, rescale: bool = False,
        resize: bool = False,
    ) -> Tensor:  # fmt: skip
        flags = torch.tensor([float(return_features), float(rescale), float(resize)])
        pooled = torch.cat([x.mean(dim=(2, 3, 4)), flags.expand(x.shape[0], 3)], dim=1)
        return torch.cat([pooled, pooled @ self.mix], dim=1)


class TinyVideoMae(nn.Module):
    """16 frames of 224x224 to features: mean, least and highest value, and differences in time."""

    def forward(self, video: Tensor) -> Tensor:
        assert list(video.shape[1:]) == [3, 16, 224, 224]
        frames = video.mean(dim=(1, 3, 4))
        return torch.cat([frames, video.amax(dim=(1, 2, 3, 4))[:, None], video.amin(dim=(1, 2, 3, 4))[:, None]], dim=1)


class TinyInception(nn.Module):
    """Signature of NVIDIA's Inception: 2048 features, or probabilities of some classes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mix", torch.randn(12, 2048))
        self.register_buffer("classes", torch.randn(2048, 10) / 100)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        assert img.dtype == torch.uint8
        small = nn.functional.adaptive_avg_pool2d(img.float() / 255, [2, 2]).flatten(1)
        features = small @ self.mix
        if return_features:
            return features
        assert no_output_bias
        return (features @ self.classes).softmax(dim=1)


def script(module: nn.Module, path: Path) -> Path:
    """Write a module as TorchScript. Only writing may warn that torch would have it exported instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), path)
    return path


@pytest.fixture
def save_script(tmp_path: Path) -> Callable[[nn.Module, str], Path]:
    return lambda module, name: script(module, tmp_path / name)


@pytest.fixture(scope="session")
def network_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of I3D, VideoMAE and Inception, all small and random."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    return {
        "i3d": script(TinyI3d(), folder / "i3d_torchscript.pt"),
        "videomae": script(TinyVideoMae(), folder / "videomae.pt"),
        "inception": script(TinyInception(), folder / "inception.pt"),
    }
