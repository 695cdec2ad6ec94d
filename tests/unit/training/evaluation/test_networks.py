"""Feature networks by path: called as their protocols say, recorded with their hash, refused when they are others."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.errors import TrainingError
from training.evaluation.networks import (
    EvaluationNetworks,
    file_hashes,
    load_i3d,
    load_inception,
    load_networks,
    load_videomae,
    squeezenet_frames,
)
from training.squeezenet import SqueezeNet

Save = Callable[[nn.Module, str], Path]


def clips(count: int = 3, frames: int = 16, size: int = 24) -> Tensor:
    return torch.randint(0, 256, (count, frames, size, size, 3), dtype=torch.uint8)


def test_i3d_is_called_by_the_protocol_of_stylegan_v(network_files: dict[str, Path]) -> None:
    network, shown = load_i3d(network_files["i3d"], device="cpu", batch_size=2), clips()
    found = network.extract(shown)
    assert found.shape == (3, 1, 11)
    torch.testing.assert_close(found[:, 0, :3], shown.float().mean(dim=(1, 2, 3)))  # 0 to 255, colours kept apart
    assert found[:, 0, 3:6].eq(1).all()  # return_features, rescale, resize
    assert network.record["sha256"] == hashlib.sha256(network_files["i3d"].read_bytes()).hexdigest()
    assert network.record["file"] == "i3d_torchscript.pt"
    with pytest.raises(TrainingError, match="at least 10 frames"):
        network.extract(clips(frames=9))


def test_videomae_gets_values_from_0_to_1_at_224_pixels(network_files: dict[str, Path]) -> None:
    network, shown = load_videomae(network_files["videomae"], device="cpu"), clips(2)
    shown[0], shown[1, 3] = 0, 255
    found = network.extract(shown)
    assert found.shape == (2, 1, 18)
    assert found[0].abs().max() == 0
    assert found[1, 0, 3] == 1
    assert found[1, 0, 16].item() == pytest.approx(1)  # the highest value of all
    with pytest.raises(TrainingError, match="16 frames, these have 8"):
        network.extract(clips(frames=8))


def test_inception_gives_features_and_probabilities_of_every_frame(network_files: dict[str, Path]) -> None:
    network, shown = load_inception(network_files["inception"], device="cpu", batch_size=5), clips(2, 3)
    features, probabilities = network.features(shown), network.probabilities(shown)
    assert features.shape == (2, 3, 2048)
    assert probabilities.shape == (2, 3, 10)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 3))
    alone = network.features(shown[1:, 2:])
    torch.testing.assert_close(features[1:, 2:], alone)  # order is kept


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean(dim=(2, 3))


class WrongShape(nn.Module):
    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return x.mean(dim=(3, 4))


class NotFinite(nn.Module):
    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return x.mean(dim=(2, 3, 4)) / 0


class Logits(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        return x.float().mean(dim=(2, 3))


def test_other_networks_are_refused_by_name(save_script: Save, tmp_path: Path) -> None:
    plain = save_script(Plain(), "plain.pt")
    for load, kind in ((load_i3d, "I3D of StyleGAN-V"), (load_inception, "inception-2015-12-05")):
        with pytest.raises(TrainingError, match=rf"plain.pt is not .*{kind}.*takes \(x\), and lacks"):
            load(plain, device="cpu")
    with pytest.raises(TrainingError, match="forward must take the video alone, it takes x, rescale"):
        load_videomae(save_script(WrongShape(), "args.pt"), device="cpu")
    with pytest.raises(TrainingError, match="must return \\(3, features\\), it returned \\(3, 3, 16\\)"):
        load_i3d(save_script(WrongShape(), "shape.pt"), device="cpu").extract(clips())
    with pytest.raises(TrainingError, match="not finite"):
        load_i3d(save_script(NotFinite(), "nan.pt"), device="cpu").extract(clips())
    logits = load_inception(save_script(Logits(), "logits.pt"), device="cpu")
    with pytest.raises(TrainingError, match="no probabilities"):
        logits.probabilities(clips())
    with pytest.raises(TrainingError, match="3 features, FID is of Inception's 2048"):
        logits.features(clips())
    (tmp_path / "text.pt").write_text("no archive", encoding="utf-8")
    with pytest.raises(TrainingError, match="no TorchScript archive"):
        load_i3d(tmp_path / "text.pt", device="cpu")
    with pytest.raises(TrainingError, match="is no file"):
        load_i3d(tmp_path / "missing.pt", device="cpu")


def test_what_is_missing_is_named() -> None:
    networks = EvaluationNetworks(squeezenet=squeezenet_frames(SqueezeNet().eval()))
    assert set(networks.absent()) == {
        "FVD", "CD-FVD", "FID and inception score", "Frame consistency in CLIP's embeddings", "Flow warping error"
    }  # fmt: skip
    assert [metric.name for metric in networks.distance_metrics()] == [
        "frechet_squeezenet", "frechet_squeezenet_motion"
    ]  # fmt: skip
    assert set(networks.records()) == {"SqueezeNet"}


def test_a_path_that_holds_something_else_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"SqueezeNet weights .* cannot be read"):
        load_networks(squeezenet=tmp_path / "none.pth", device="cpu")


def test_every_file_of_a_folder_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("x", encoding="utf-8")
    digest = hashlib.sha256(b"x").hexdigest()
    assert file_hashes(tmp_path) == {"a/b.txt": digest}
    assert file_hashes(tmp_path / "a" / "b.txt") == {"b.txt": digest}


def test_features_of_the_same_clips_are_computed_once() -> None:
    network = SqueezeNet().eval()
    frames: list[int] = []
    pooled = network.pooled

    def counted(images: Tensor) -> Tensor:
        frames.append(len(images))
        return pooled(images)

    network.pooled = counted  # type: ignore[method-assign]
    features = squeezenet_frames(network, batch_size=2).extract
    shown = clips(3)
    found = features(shown)
    assert sum(frames) == 3 * 16
    assert features(shown) is found
    assert sum(frames) == 3 * 16
    torch.testing.assert_close(features(shown.clone()), found)
    assert sum(frames) == 2 * 3 * 16
