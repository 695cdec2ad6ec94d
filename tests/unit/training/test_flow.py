"""RAFT-small: the published layout, known shifts, and the colours of flow."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from training.errors import TrainingError
from training.flow import MOTION_CHANNELS, CorrelationPyramid, Raft, flow_to_colour, load_raft

PUBLISHED = Path(__file__).parents[4] / "shared" / "weights" / "raft-small.pth"


def weights_in_the_published_layout() -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in Raft().state_dict().items()}


def texture(size: int, seed: int) -> Tensor:
    """Detail at several scales: (1 3 size size) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, size, size)
    for scale in (1, 2, 4, 8):
        noise = torch.randn(1, 3, size // scale, size // scale, generator=generator)
        image += scale**0.5 * F.interpolate(noise, size=(size, size), mode="bicubic")
    return image / image.abs().max()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_in_the_published_layout_is_loaded_frozen(tmp_path: Path, suffix: str) -> None:
    weights, path = weights_in_the_published_layout(), tmp_path / f"raft.{suffix}"
    assert len(weights) == 106
    assert sum(value.numel() for value in weights.values()) == 990_162  # the published network's size
    assert weights["module.update_block.gru.convz.weight"].shape == (96, 242, 3, 3)
    assert weights["module.cnet.layer2.0.downsample.0.weight"].shape == (64, 32, 1, 1)
    if suffix == "pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    network = load_raft(path)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[f"module.{name}"])


def test_other_files_are_refused(tmp_path: Path) -> None:
    weights = weights_in_the_published_layout()
    weights.pop("module.fnet.conv2.bias")
    save_file(weights, tmp_path / "raft.safetensors")
    with pytest.raises(TrainingError, match="holds no RAFT-small"):
        load_raft(tmp_path / "raft.safetensors")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    for name in ("bad.pth", "missing.pth"):
        with pytest.raises(TrainingError, match="cannot be read"):
            load_raft(tmp_path / name)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Dangerous:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("ran",))

    torch.save({"module.fnet.conv1.weight": Dangerous()}, tmp_path / "raft.pth")
    with pytest.raises(TrainingError, match="cannot be read"):
        load_raft(tmp_path / "raft.pth")


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published weights are not here")
@pytest.mark.parametrize("shift", [(3.0, 0.0), (0.0, 5.0), (-7.0, 2.0), (1.5, -2.5), (12.0, -9.0), (0.0, 0.0)])
def test_known_shifts_are_found(shift: tuple[float, float]) -> None:
    raft, image = load_raft(PUBLISHED), texture(160, seed=0)
    right, down = shift
    rows, columns = torch.meshgrid(torch.arange(16.0, 144.0) - down, torch.arange(16.0, 144.0) - right, indexing="ij")
    place = torch.stack([(2 * columns + 1) / 160 - 1, (2 * rows + 1) / 160 - 1], dim=-1)[None]
    first = image[:, :, 16:144, 16:144]
    second = F.grid_sample(image, place, mode="bicubic", align_corners=False).clamp(-1, 1)
    flow = raft(first, second)
    assert flow.shape == (1, 2, 128, 128)
    away = (flow - torch.tensor(shift)[None, :, None, None])[:, :, 16:-16, 16:-16].norm(dim=1)
    assert float(away.mean()) < 0.5


def test_pairs_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    raft = Raft(num_updates=2).eval()
    first, second = torch.rand(3, 3, 32, 48) * 2 - 1, torch.rand(3, 3, 32, 48) * 2 - 1
    flow, state = raft.flow_and_motion(first, second)
    assert state.shape == (3, MOTION_CHANNELS, 4, 6)
    assert float(state.abs().max()) <= 1
    alone, _ = raft.flow_and_motion(first[1:2], second[1:2])
    torch.testing.assert_close(flow[1:2], alone, atol=1e-4, rtol=1e-4)
    assert float((flow[0] - flow[1]).abs().max()) > 1e-3


def test_correlations_are_looked_up_where_the_flow_points() -> None:
    """Against a plain loop: whole and half steps, all levels, nothing outside."""
    torch.manual_seed(0)
    first, second = torch.randn(1, 5, 8, 8), torch.randn(1, 5, 8, 8)
    pyramid = CorrelationPyramid(first, second)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    found = pyramid.around(torch.stack([columns + 2, rows - 1])[None])
    assert found.shape == (1, 4 * 49, 8, 8)
    for row, column, right, down in [(3, 2, 0, 0), (3, 2, 2, -1), (0, 0, -3, 3), (7, 7, 1, 1)]:
        y, x = row - 1 + down, column + 2 + right
        expected = 0.0
        if 0 <= y < 8 and 0 <= x < 8:
            expected = float(first[0, :, row, column] @ second[0, :, y, x]) / 5**0.5
        assert abs(float(found[0, (right + 3) * 7 + down + 3, row, column]) - expected) < 1e-5
    # one level up, at half the coordinates: cell (2 down, 4 right) of the other frame is cell (1, 2) of 4 x 4
    coarse = F.avg_pool2d(second, 2)
    expected = float(first[0, :, 3, 2] @ coarse[0, :, 1, 2]) / 5**0.5
    assert abs(float(found[0, 49 + 24, 3, 2]) - expected) < 1e-5


def test_sizes_that_do_not_fit_are_refused() -> None:
    raft = Raft(num_updates=1).eval()
    for height, width in ((12, 32), (8, 32)):
        with pytest.raises(ValueError, match=f"{width}x{height}"):
            raft(torch.zeros(1, 3, height, width), torch.zeros(1, 3, height, width))
    assert raft(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)).isfinite().all()


def test_colour_is_direction_and_paleness_is_slowness() -> None:
    flow = torch.zeros(2, 2, 1, 5)
    flow[0, :, 0] = torch.tensor([[4.0, 0, 0, 0, 2.0], [0, 4.0, -4.0, 0, 0]])
    flow[1] = flow[0] * 0.01  # each frame by its own largest flow
    colour = flow_to_colour(flow)
    torch.testing.assert_close(colour[0], colour[1])
    right, down, up, still, half = colour[0, :, 0].T
    torch.testing.assert_close(right, torch.tensor([1.0, 0.0, 0.0]))
    assert down[0] == 1
    assert down[1] > 0.8
    assert down[2] == 0
    assert up[2] == 1
    assert up[1] == 0
    torch.testing.assert_close(still, torch.ones(3))
    torch.testing.assert_close(half, torch.tensor([1.0, 0.5, 0.5]))
    assert torch.equal(flow_to_colour(torch.zeros(1, 2, 2, 2)), torch.ones(1, 3, 2, 2))
    angle = torch.linspace(-3.1, 3.1, 200)
    around = flow_to_colour(torch.stack([angle.cos(), angle.sin()])[None, :, None])[0, :, 0]
    assert float(around.diff(dim=1).abs().max()) < 0.3  # no jump but the wheel's own steps
    assert around.min() >= 0
    assert around.max() <= 1
