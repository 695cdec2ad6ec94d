"""SqueezeNet: layer names and sizes of Caffe's file, and what may be loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from training.errors import TrainingError
from training.squeezenet import SqueezeNet, load_squeezenet


def caffe_weights() -> dict[str, torch.Tensor]:
    return {
        key.removeprefix("fires.").replace(".conv", "/conv", 1) if key.startswith("fires.") else key: value
        for key, value in SqueezeNet().state_dict().items()
    }


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_in_caffes_names_is_loaded_frozen(tmp_path: Path, suffix: str) -> None:
    weights, path = caffe_weights(), tmp_path / f"net.{suffix}"
    assert "fire2/conv1x1_1.weight" in weights
    assert sum(value.numel() for value in weights.values()) == 1_248_424  # the published network's size
    if suffix == "pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    network = load_squeezenet(path)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(network.fires["fire9"].conv3x3_2.weight, weights["fire9/conv3x3_2.weight"])


def test_layers_have_caffes_sizes() -> None:
    with torch.no_grad():
        layers = SqueezeNet().layers(torch.zeros(1, 3, 227, 227))
    sizes = {name: tuple(value.shape[1:]) for name, value in layers.items()}
    assert sizes["conv1"] == (96, 111, 111)
    assert sizes["fire4"] == (256, 55, 55)
    assert sizes["fire8"] == (512, 27, 27)
    assert sizes["fire9"] == (512, 13, 13)


def test_input_is_bgr_less_the_mean() -> None:
    network = SqueezeNet()
    seen: list[torch.Tensor] = []
    network.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    red = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 32, 32)
    network.pooled(red)
    assert seen[0][0, :, 0, 0].tolist() == [0 - 104, 0 - 117, 255 - 123]


def test_other_files_are_refused(tmp_path: Path) -> None:
    weights = caffe_weights()
    weights.pop("conv_final.bias")
    save_file(weights, tmp_path / "net.safetensors")
    with pytest.raises(TrainingError, match="holds no SqueezeNet"):
        load_squeezenet(tmp_path / "net.safetensors")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    for name in ("bad.pth", "missing.pth"):
        with pytest.raises(TrainingError, match="cannot be read"):
            load_squeezenet(tmp_path / name)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Dangerous:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("ran",))

    torch.save({"conv1.weight": Dangerous()}, tmp_path / "net.pth")
    with pytest.raises(TrainingError, match="cannot be read"):
        load_squeezenet(tmp_path / "net.pth")
