"""The inside of a Mamba-2 mixer: against the block written out token by token, and as the kernels go about it."""

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from medsora.config import DenoiserConfig
from medsora.errors import BackendError
from medsora.models.blocks import SpatialMamba, TemporalMamba
from medsora.ops import BACKENDS, OPERATORS, MixerWeights, Walks, mix, mixer, resolve_backend
from medsora.ops.mixer import can_fuse, mix_fused, mix_torch

CPU = torch.device("cpu")
CONFIG = DenoiserConfig(hidden_size=16, depth=1, headdim=16, temporal_directions=2)
ON_A_CPU = ("reference", "dual", "chunked")


def weights_of(
    *, d_inner: int = 8, d_state: int = 4, headdim: int = 4, taps: int = 4, dtype: torch.dtype = torch.float64
) -> MixerWeights:
    heads, channels = d_inner // headdim, d_inner + 2 * d_state
    return MixerWeights(
        conv_weight=torch.randn(channels, taps, dtype=dtype) / 2,
        conv_bias=torch.randn(channels, dtype=dtype) / 2,
        dt_bias=torch.randn(heads, dtype=dtype),
        A_log=torch.rand(heads, dtype=dtype) * 2,
        D=torch.randn(heads, dtype=dtype),
        norm_gain=1 + torch.randn(d_inner, dtype=dtype) / 2,
    )


def projected_for(walks: Walks, weights: MixerWeights, *, batch: int = 2) -> Tensor:
    width = 2 * weights.d_inner + 2 * weights.d_state + len(weights.A_log)
    return torch.randn(batch, walks.num_tokens, width, dtype=weights.norm_gain.dtype)


def shuffled(num_walks: int, num_sequences: int, length: int) -> Walks:
    """Walks in no order that anything could rely on."""
    members = torch.randperm(num_sequences * length).reshape(num_sequences, length)
    orders = [[row[torch.randperm(length)] for row in members] for _ in range(num_walks)]
    return Walks(torch.stack([torch.stack(rows) for rows in orders]))


def written_out(projected: Tensor, walks: Walks, weights: MixerWeights) -> Tensor:
    """The Mamba-2 block between its projections, one token at a time.

    Source: Dao and Gu, arXiv 2405.21060 (the Mamba-2 block, parallel projections; A is one number a head).
    """
    d_inner, d_state, headdim = weights.d_inner, weights.d_state, weights.headdim
    heads, taps = len(weights.A_log), weights.conv_weight.shape[1]
    result = torch.zeros(*projected.shape[:2], d_inner, dtype=torch.float64)
    for clip, tokens in enumerate(projected.double()):
        for sequence in walks.visits.flatten(0, 1).tolist():
            state = torch.zeros(heads, headdim, d_state, dtype=torch.float64)
            for step, token in enumerate(sequence):
                z, dt = tokens[token, :d_inner], tokens[token, -heads:]
                convolved = weights.conv_bias.double()
                for back in range(min(step + 1, taps)):
                    earlier = tokens[sequence[step - back], d_inner:-heads]
                    convolved = convolved + earlier * weights.conv_weight[:, taps - 1 - back]
                convolved = convolved * torch.sigmoid(convolved)
                x, B, C = convolved[:d_inner], convolved[d_inner : d_inner + d_state], convolved[d_inner + d_state :]
                y = torch.zeros(d_inner, dtype=torch.float64)
                for head in range(heads):
                    of_head = slice(head * headdim, (head + 1) * headdim)
                    delta = torch.log(1 + torch.exp(dt[head] + weights.dt_bias[head]))
                    decay = torch.exp(-delta * torch.exp(weights.A_log[head]))
                    state[head] = decay * state[head] + delta * torch.outer(x[of_head], B)
                    y[of_head] = state[head] @ C + weights.D[head] * x[of_head]
                gated = y * z * torch.sigmoid(z)
                result[clip, token] += gated / (gated.square().mean() + 1e-5).sqrt() * weights.norm_gain
    return result


@pytest.mark.parametrize("backend", ["auto", *ON_A_CPU])
@pytest.mark.parametrize(
    ("num_walks", "num_sequences", "length"), [(1, 3, 1), (1, 2, 7), (2, 3, 4), (2, 1, 70), (3, 2, 5)]
)
def test_it_equals_the_block_written_out(num_walks: int, num_sequences: int, length: int, backend: str) -> None:
    walks, weights = shuffled(num_walks, num_sequences, length), weights_of()
    projected = projected_for(walks, weights)
    expected = written_out(projected, walks, weights)
    assert torch.allclose(mix(projected, walks, weights, backend=backend), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("taps", [1, 2, 6])
def test_convolutions_of_any_length(taps: int) -> None:
    walks, weights = shuffled(2, 2, 5), weights_of(d_inner=12, d_state=3, headdim=6, taps=taps)
    projected = projected_for(walks, weights)
    expected = written_out(projected, walks, weights)
    assert torch.allclose(mix(projected, walks, weights), expected, rtol=1e-9, atol=1e-9)


def test_sizes_are_read_from_the_shapes_of_the_weights() -> None:
    weights = weights_of(d_inner=24, d_state=5, headdim=8)
    assert (weights.d_inner, weights.d_state, weights.headdim) == (24, 5, 8)


def test_gradients_are_those_of_finite_differences() -> None:
    walks, weights = shuffled(2, 2, 3), weights_of(d_inner=4, d_state=2, headdim=2, taps=2)
    leaves = [projected_for(walks, weights, batch=1), *vars(weights).values()]

    def mixed(projected: Tensor, *values: Tensor) -> Tensor:
        return mix(projected, walks, MixerWeights(*values))

    assert torch.autograd.gradcheck(mixed, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_stays_close(dtype: torch.dtype) -> None:
    walks, weights = shuffled(2, 4, 16), weights_of(d_inner=64, d_state=16, headdim=16)
    projected = projected_for(walks, weights)
    halves = MixerWeights(*(value.to(dtype) for value in vars(weights).values()))
    mixed = mix(projected.to(dtype), walks, halves)
    assert mixed.dtype == dtype
    rounded = MixerWeights(*(value.double() for value in vars(halves).values()))
    exact = mix(projected.to(dtype).double(), walks, rounded)
    # products and decays each rounded to 8 or 11 bits
    assert (mixed - exact).norm() < (2e-2 if dtype == torch.bfloat16 else 3e-3) * exact.norm()


def by_tiles(projected: Tensor, walks: Walks, weights: MixerWeights) -> tuple[Tensor, Tensor]:
    """What the kernels compute, by the tables that they read and in their order, without their blocks of channels."""
    tiles = walks.tiles(weights.conv_weight.shape[1] - 1)
    d_inner, d_state, headdim = weights.d_inner, weights.d_state, weights.headdim
    heads, taps = len(weights.A_log), weights.conv_weight.shape[1]
    gated = torch.full((walks.num_walks, *projected.shape[:2], d_inner), torch.nan, dtype=projected.dtype)
    squares = torch.full((walks.num_walks, *projected.shape[:2], heads), torch.nan, dtype=projected.dtype)
    place = torch.arange(tiles.size)
    for tile, token in enumerate(tiles.tokens.long()):
        is_real = token >= 0
        rows = projected[:, token.clamp_min(0)]  # what is loaded for a place without a token must not matter
        z, present, raw = rows.split([d_inner, d_inner + 2 * d_state, heads], dim=-1)
        step = F.softplus(raw + weights.dt_bias)
        for walk in range(walks.num_walks):
            rank, previous = tiles.ranks[walk, tile], tiles.previous[walk, :, tile].long()
            before = (place[:, None] // tiles.length == place // tiles.length) & (rank <= rank[:, None])
            before = before & is_real[:, None] & is_real
            total = weights.conv_bias + present * weights.conv_weight[:, -1]
            for tap in range(1, taps):
                earlier = projected[:, previous[tap - 1].clamp_min(0), d_inner : projected.shape[2] - heads]
                earlier = torch.where(previous[tap - 1, :, None] >= 0, earlier, 0.0)
                total = total + earlier * weights.conv_weight[:, taps - 1 - tap]
            x, keys, queries = F.silu(total).split([d_inner, d_state, d_state], dim=-1)
            scores = torch.where(before, queries @ keys.mT, 0.0)
            decays = before.to(projected.dtype) @ (-step * weights.A_log.exp())
            for head in range(heads):
                of_head = slice(head * headdim, (head + 1) * headdim)
                exponent = decays[:, :, None, head] - decays[:, None, :, head]
                mixing = scores * exponent.clamp_max(0).exp() * step[:, None, :, head]
                y = mixing @ x[..., of_head] + weights.D[head] * x[..., of_head]
                result = (y * F.silu(z[..., of_head]))[:, is_real]
                gated[walk, :, token[is_real], of_head] = result
                squares[walk, :, token[is_real], head] = result.square().sum(dim=-1)
    return gated, squares


def network_walks(latent: tuple[int, int, int], scan_order: str) -> list[Walks]:
    planes = SpatialMamba(DenoiserConfig(hidden_size=16, depth=1, headdim=16, scan_order=scan_order), index=5)
    return [*planes.walks(*latent, CPU), *TemporalMamba(CONFIG).walks(*latent, CPU)]


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("scan_order", ["spiral", "released"])
@pytest.mark.parametrize("latent", [(4, 4, 4), (5, 3, 7), (2, 2, 3), (13, 2, 3)])
def test_tiles_hold_all_that_a_kernel_needs(
    latent: tuple[int, int, int], scan_order: str, taps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also sequences that do not fill a tile, and fewer steps than the convolution has taps."""
    kernels = ModuleType("medsora.kernels.mixer")
    kernels.gated_scans = by_tiles  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "medsora.kernels.mixer", kernels)
    weights = weights_of(taps=taps)
    for walks in network_walks(latent, scan_order):
        projected = projected_for(walks, weights)
        expected = mix_torch(projected, walks, weights, backend="reference")
        assert torch.allclose(mix_fused(projected, walks, weights), expected, rtol=1e-9, atol=1e-9)


WITHOUT_TRITON, WITH_TRITON = None, ModuleType("triton")


def why_not(
    monkeypatch: pytest.MonkeyPatch,
    *,
    walks: tuple[int, int, int] = (2, 3, 4),
    d_state: int = 16,
    headdim: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    trains: str = "nothing",
    triton: ModuleType | None = WITH_TRITON,
) -> str | None:
    """What ``can_fuse`` says of operands on a GPU, whether or not there is one here: they are shapes without values."""
    monkeypatch.setattr(mixer, "_import_problem", inspect.unwrap(mixer._import_problem))  # without what it remembers
    monkeypatch.setitem(sys.modules, "triton", triton)
    made, weights = shuffled(*walks), weights_of(d_inner=2 * headdim, d_state=d_state, headdim=headdim)
    with FakeTensorMode():
        projected = torch.empty(2, made.num_tokens, 8, device=device, dtype=dtype)
    projected.requires_grad_(trains == "projected")
    weights.norm_gain.requires_grad_(trains == "weights")
    return can_fuse(made, weights, projected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "operands",
    [
        {},
        {"walks": (1, 3, 4)},
        {"walks": (2, 2, 128)},
        {"walks": (2, 3, 1)},
        {"d_state": 128, "headdim": 64},
    ],
    ids=str,
)
def test_operands_that_the_kernels_take(
    operands: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why_not(monkeypatch, dtype=dtype, **operands) is None


@pytest.mark.parametrize(
    ("operands", "problem"),
    [
        ({"device": "cpu"}, "it needs tensors on a CUDA device, got cpu"),
        ({"trains": "projected"}, "it has no gradients"),
        ({"trains": "weights"}, "it has no gradients"),
        ({"dtype": torch.float64}, "it takes bfloat16, float16 or float32, got torch.float64"),
        ({"walks": (2, 2, 129)}, "it takes sequences of at most 128, got 129"),
        ({"walks": (3, 2, 4)}, "it takes one walk or two, got 3"),
        ({"headdim": 8}, "it takes powers of two from 16 on, got {'headdim': 8, 'd_state': 16}"),
        ({"d_state": 48}, "it takes powers of two from 16 on, got {'headdim': 16, 'd_state': 48}"),
        ({"triton": WITHOUT_TRITON}, "triton cannot be imported (import of triton halted; "),
    ],
    ids=str,
)
def test_operands_that_the_kernels_do_not_take_are_named(
    operands: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = why_not(monkeypatch, **operands)
    assert said is not None
    assert said.startswith(problem)


@pytest.mark.parametrize("trains", ["projected", "weights"])
def test_without_gradients_parameters_are_no_hindrance(trains: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        assert why_not(monkeypatch, trains=trains) is None


def test_kernels_asked_for_on_a_cpu_are_refused() -> None:
    walks, weights = shuffled(1, 2, 3), weights_of()
    with pytest.raises(
        BackendError, match="back end fused cannot run here: it needs tensors on a CUDA device, got cpu"
    ):
        mix(projected_for(walks, weights), walks, weights, backend="fused")


def test_where_the_kernels_are_best_and_cannot_run_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    walks, weights = shuffled(2, 2, 3), weights_of()
    projected = projected_for(walks, weights)
    monkeypatch.setattr(mixer, "resolve_backend", lambda name, **operands: "fused")
    assert torch.equal(mix(projected, walks, weights), mix_torch(projected, walks, weights))


def test_the_kernels_run_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    walks, weights = shuffled(2, 2, 3), weights_of()
    projected = projected_for(walks, weights)
    monkeypatch.setattr(mixer, "can_fuse", lambda walks, weights, projected: None)
    monkeypatch.setattr(mixer, "mix_fused", lambda projected, walks, weights: torch.full_like(projected, 7.0))
    assert (mix(projected, walks, weights, backend="fused") == 7).all()
    assert not (mix(projected, walks, weights, backend="auto") == 7).any()  # not on a CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_auto_takes_the_kernels_nowhere_on_a_cpu(dtype: torch.dtype) -> None:
    chosen = {
        resolve_backend("auto", operator="mixer", length=length, batch=batch, device=CPU, dtype=dtype)
        for length in (1, 4, 16, 64, 128, 1000)
        for batch in (1, 100, 10_000)
    }
    assert chosen <= set(ON_A_CPU)


def test_a_mixer_has_the_back_ends_of_its_scan_and_the_kernels() -> None:
    assert OPERATORS["ssd"] == tuple(BACKENDS)
    assert OPERATORS["mixer"] == (*BACKENDS, "fused")
    walks, weights = shuffled(1, 2, 3), weights_of()
    with pytest.raises(BackendError, match="one of auto, reference, dual, chunked, mamba_ssm, fused; got 'fast'"):
        mix(projected_for(walks, weights), walks, weights, backend="fast")


@pytest.mark.parametrize("backend", ON_A_CPU)
def test_the_scan_runs_by_the_back_end_that_was_asked_for(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def ssd(x: Tensor, *operands: Tensor, backend: str) -> Tensor:
        ran.append(backend)
        return x

    monkeypatch.setattr(mixer, "ssd", ssd)
    walks, weights = shuffled(2, 2, 3), weights_of()
    mix(projected_for(walks, weights), walks, weights, backend=backend)
    assert ran == [backend]


def test_auto_goes_by_the_length_and_the_number_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(name: str, **operands: Any) -> str:
        asked.append(operands)
        return "dual"

    monkeypatch.setattr(mixer, "resolve_backend", resolve)
    walks, weights = shuffled(2, 3, 5), weights_of()
    mix(projected_for(walks, weights, batch=7), walks, weights)
    assert asked == [{"operator": "mixer", "length": 5, "batch": 2 * 3 * 7, "device": CPU, "dtype": torch.float64}]
