"""LPIPS: the layout of the published files, and the distance against its formula."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from training.errors import TrainingError
from training.lpips import BACKBONES, Lpips, load_lpips
from training.perceptual import load_distance, lpips_distance

SLICES = {  # torchvision's layers in each slice of the lpips package
    "alex": ((0,), (3,), (6,), (8,), (10,)),
    "vgg": ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)),
}
CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


def convolutions(backbone: str) -> dict[int, tuple[Tensor, Tensor]]:
    """Random weights in the published shapes, by torchvision's number."""
    generator = torch.Generator().manual_seed(0)
    before, found = 3, {}
    for layer in BACKBONES[backbone]:
        shape = (layer.channels, before, layer.size, layer.size)
        weight = torch.randn(shape, generator=generator) * (2.0 / (before * layer.size**2)) ** 0.5
        found[layer.index] = (weight, 0.1 * torch.randn(layer.channels, generator=generator))
        before = layer.channels
    return found


def learned(backbone: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"lin{number}.model.1.weight": torch.rand(1, channels, 1, 1, generator=generator)
        for number, channels in enumerate(CHANNELS[backbone])
    }


def whole_state(backbone: str) -> dict[str, Tensor]:
    """Names as the state of the lpips package's network has them."""
    state = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    weights = convolutions(backbone)
    for number, indices in enumerate(SLICES[backbone], start=1):
        for index in indices:
            state[f"net.slice{number}.{index}.weight"], state[f"net.slice{number}.{index}.bias"] = weights[index]
    for name, value in learned(backbone).items():
        state[name] = value
        state[name.replace("lin", "lins.", 1)] = value.clone()
    return state


def torchvision_state(backbone: str) -> dict[str, Tensor]:
    state = {"classifier.1.weight": torch.zeros(3, 3)}
    for index, (weight, bias) in convolutions(backbone).items():
        state[f"features.{index}.weight"], state[f"features.{index}.bias"] = weight, bias
    return state


@pytest.mark.parametrize(("backbone", "parameters"), [("alex", 2_469_696 + 1152), ("vgg", 14_714_688 + 1472)])
def test_both_layouts_give_the_same_frozen_network(tmp_path: Path, backbone: str, parameters: int) -> None:
    torch.save(whole_state(backbone), tmp_path / "whole.pth")
    save_file(learned(backbone), tmp_path / "learned.safetensors")
    torch.save(torchvision_state(backbone), tmp_path / "backbone.pth")
    whole = load_lpips(tmp_path / "whole.pth")
    parts = load_lpips(tmp_path / "learned.safetensors", backbone=tmp_path / "backbone.pth")
    assert whole.backbone == parts.backbone == backbone
    assert sum(value.numel() for value in whole.parameters()) == parameters
    assert not any(value.requires_grad for value in whole.parameters())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name])


def plain_alex(frames: Tensor, other: Tensor) -> Tensor:
    """The distance written out: AlexNet's features as torchvision lays them out, equation 1 of the paper."""
    weights, distances = convolutions("alex"), torch.zeros(len(frames))
    mean = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    deviation = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    x, y = (frames - mean) / deviation, (other - mean) / deviation
    for number, index in enumerate((0, 3, 6, 8, 10)):
        stride, padding = {0: (4, 2), 3: (1, 2)}.get(index, (1, 1))

        def layer(z: Tensor, index: int = index, stride: int = stride, padding: int = padding) -> Tensor:
            if index in (3, 6):
                z = F.max_pool2d(z, 3, 2)
            return F.relu(F.conv2d(z, *weights[index], stride=stride, padding=padding))

        x, y = layer(x), layer(y)
        a, b = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
        weight = learned("alex")[f"lin{number}.model.1.weight"]
        distances += F.conv2d((a - b) ** 2, weight).mean(dim=(1, 2, 3))
    return distances


def test_the_distance_is_the_formula(tmp_path: Path) -> None:
    torch.save(whole_state("alex"), tmp_path / "lpips.pth")
    network = load_lpips(tmp_path / "lpips.pth")
    frames, other = torch.rand(3, 3, 64, 48) * 2 - 1, torch.rand(3, 3, 64, 48) * 2 - 1
    found = network(frames, other)
    torch.testing.assert_close(found, plain_alex(frames, other), rtol=1e-4, atol=1e-6)
    assert (network(frames, frames) == 0).all()
    torch.testing.assert_close(lpips_distance(network)(frames, other), found.mean())


def test_the_gradient_goes_to_the_reconstruction(tmp_path: Path) -> None:
    torch.save(whole_state("alex"), tmp_path / "lpips.pth")
    distance = load_distance(lpips=tmp_path / "lpips.pth")
    assert distance is not None
    frames, other = (torch.rand(1, 3, 48, 48, requires_grad=True) for _ in range(2))
    distance(frames, other).backward()
    assert frames.grad is not None
    assert frames.grad.any()
    assert other.grad is None
    assert load_distance() is None


def test_vgg_has_features_at_five_sizes() -> None:
    network = Lpips("vgg")
    with torch.no_grad():
        taps = network.taps(torch.zeros(1, 3, 64, 64))
    assert [tuple(tap.shape[1:]) for tap in taps] == [
        (64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4)
    ]  # fmt: skip


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file(learned("alex"), tmp_path / "learned.safetensors")
    with pytest.raises(TrainingError, match=r"no backbone.*--lpips-backbone"):
        load_lpips(tmp_path / "learned.safetensors")
    torch.save(torchvision_state("vgg"), tmp_path / "backbone.pth")
    with pytest.raises(TrainingError, match="no learned weights"):
        load_lpips(tmp_path / "backbone.pth")
    with pytest.raises(TrainingError, match="no LPIPS with vgg"):
        load_lpips(tmp_path / "learned.safetensors", backbone=tmp_path / "backbone.pth")
    with pytest.raises(TrainingError, match="cannot be read"):
        load_lpips(tmp_path / "missing.pth")
