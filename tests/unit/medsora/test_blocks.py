"""The mixers against straightforward versions of what they say they do."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medsora.config import DenoiserConfig
from medsora.models.blocks import LocalAttention, Mamba2, SpatialMamba, TemporalMamba
from medsora.models.scans import inverse_order, spiral_order
from medsora.ops import Walks

CONFIG = DenoiserConfig(
    in_channels=4, out_channels=4, hidden_size=32, depth=1, d_state=8, headdim=16, temporal_directions=2
)


def naive_mamba(mamba: Mamba2, x: Tensor) -> Tensor:
    """A Mamba-2 layer on (length, hidden), step by step in float64, merged output included."""
    weights = {name: value.double() for name, value in mamba.state_dict().items()}
    projected = x.double() @ weights["in_proj.weight"].T
    d_inner, d_state, heads = mamba.d_inner, mamba.d_state, weights["A_log"].shape[0]
    z, conv_in, dt = projected.split([d_inner, d_inner + 2 * d_state, heads], dim=-1)
    state = torch.zeros(heads, mamba.headdim, d_state, dtype=torch.float64)
    outputs = []
    for i in range(len(x)):
        mixed = weights["conv_bias"].clone()
        for k in range(4):  # tap 3 is the present
            if i + k - 3 >= 0:
                mixed += conv_in[i + k - 3] * weights["conv_weight"][:, k]
        u, B, C = F.silu(mixed).split([d_inner, d_state, d_state])
        u = u.reshape(heads, mamba.headdim)
        step = F.softplus(dt[i] + weights["dt_bias"])
        decay = torch.exp(-step * weights["A_log"].exp())
        state = decay[:, None, None] * state + (step[:, None] * u)[:, :, None] * B
        y = (state @ C + weights["D"][:, None] * u).flatten() * F.silu(z[i])
        y = y / (y.square().mean() + 1e-5).sqrt() * weights["norm_gain"]
        outputs.append(y @ weights["out_proj.weight"].T)
    return torch.stack(outputs)


def test_mamba_equals_the_step_by_step_layer() -> None:
    mamba, x = Mamba2(CONFIG), torch.randn(11, 32)
    walks = Walks(torch.arange(11)[None, None])
    ours = mamba.merge(mamba.mix(mamba.project(x[None]), walks, backend="auto"))[0]
    assert torch.allclose(ours.double(), naive_mamba(mamba, x), atol=1e-5)


def test_mamba_starts_with_the_published_decays_and_step_sizes() -> None:
    mamba = Mamba2(replace(CONFIG, hidden_size=256, expand=16, headdim=1))  # 4096 heads: enough to see a distribution
    rate, step = mamba.A_log.detach().exp(), F.softplus(mamba.dt_bias.detach())
    # rates uniform in [1, 16]; steps uniform in their logarithm in [0.001, 0.1]
    for value, low, high in ((rate, 1.0, 16.0), (step.log10(), -3.0, -1.0)):
        unit = (value.sort().values - low) / (high - low)
        assert unit[0] > -1e-3
        assert unit[-1] < 1 + 1e-3
        assert (unit - torch.linspace(0, 1, len(unit))).abs().max() < 0.04  # Kolmogorov-Smirnov
    assert torch.equal(mamba.D, torch.ones(4096))
    assert torch.equal(mamba.norm_gain, torch.ones(4096))
    for parameter in (mamba.conv_weight, mamba.conv_bias):  # torch's default for a depthwise kernel of 4
        assert 0.49 < parameter.abs().max() <= 0.5
        assert abs(parameter.mean()) < 0.02


@pytest.mark.parametrize("scan_order", ["spiral", "released"])
@pytest.mark.parametrize("index", [0, 5])
def test_spatial_mamba_is_four_scans_of_two_planes_fused_by_gates(index: int, scan_order: str) -> None:
    module = SpatialMamba(replace(CONFIG, scan_order=scan_order), index)
    x = torch.randn(2, 3, 4, 5, 32)  # b f h w d
    ours = module(x, backend="auto")

    def scanned(plane: Tensor) -> Tensor:  # (rows, columns, d)
        rows, columns, _ = plane.shape
        order = spiral_order(rows, columns, index)
        walks = [list(order), list(order)[::-1]]
        if scan_order == "released":  # gathers with the ranks, and for the way back with the ranks counted from the end
            ranks = inverse_order(order)
            walks = [list(ranks), [len(ranks) - 1 - rank for rank in ranks]]
        tokens, result = plane.flatten(0, 1), torch.zeros(rows * columns, 32, dtype=torch.float64)
        for walk in walks:
            result[walk] += naive_mamba(module.mamba, tokens[walk])
        return result.unflatten(0, (rows, columns))

    over_width, over_height = torch.zeros(2, *x.shape, dtype=torch.float64)
    for b in range(2):
        for row in range(4):
            over_width[b, :, row] = scanned(x[b, :, row])
        for column in range(5):
            over_height[b, :, :, column] = scanned(x[b, :, :, column])
    gates = module.double()
    expected = torch.sigmoid(gates.gate_width(over_width)) * over_width
    expected += torch.sigmoid(gates.gate_height(over_height)) * over_height
    assert torch.allclose(ours.double(), expected, atol=1e-5)


@pytest.mark.parametrize("directions", [1, 2])
def test_temporal_mamba_scans_the_frames_of_each_place(directions: int) -> None:
    module = TemporalMamba(replace(CONFIG, temporal_directions=directions))
    x = torch.randn(2, 4, 2, 3, 32)
    ours = module(x, backend="auto")
    site = x[1, :, 1, 2]
    expected = naive_mamba(module.mamba, site)
    if directions == 2:
        expected = expected + naive_mamba(module.mamba, site.flip(0)).flip(0)
    assert torch.allclose(ours[1, :, 1, 2].double(), expected, atol=1e-5)


def test_local_attention_sees_window_neighbours_and_no_others() -> None:
    module, x = LocalAttention(16, window=3), torch.randn(1, 20, 16)
    changed = x.clone()
    changed[0, 10] += 1
    moved = (module(x) - module(changed)).abs().sum(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == list(range(7, 14))


def test_local_attention_equals_softmax_written_out() -> None:
    module, x = LocalAttention(16, window=4).double(), torch.randn(9, 16, dtype=torch.float64)
    q, k, v = module.query(x), module.key(x), module.value(x)

    def rotated(vector: Tensor, position: int) -> Tensor:
        turns = torch.tensor([position * 10000.0 ** (-i / 8) for i in range(8)], dtype=torch.float64)
        as_complex = torch.complex(vector[:8], vector[8:]) * torch.polar(torch.ones(8, dtype=torch.float64), turns)
        return torch.cat([as_complex.real, as_complex.imag])

    for i in range(9):
        near = [j for j in range(9) if abs(i - j) <= 4]
        logits = torch.stack([rotated(q[i], i) @ rotated(k[j], j) for j in near]) / 16**0.5
        expected = logits.softmax(0) @ v[near]
        assert torch.allclose(module(x[None])[0, i], expected, atol=1e-6)


def test_scan_indices_made_in_inference_mode_serve_training_too() -> None:
    module, x = SpatialMamba(CONFIG, 0), torch.randn(1, 2, 2, 2, 32)
    with torch.inference_mode():
        module(x, backend="auto")
    module(x, backend="auto").sum().backward()
    assert module.mamba.in_proj.weight.grad is not None
