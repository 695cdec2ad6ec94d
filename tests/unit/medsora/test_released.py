"""Weights of the released code: the imported network against the released one, written out plainly.

The reference is from a description of the released code: loops over tokens, windows and walks, one projection a scan.
It runs in float64, and in float32 for a measure of what float32 does to the same sums.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner, Result

from medsora.checkpoint import load_checkpoint
from medsora.cli import app
from medsora.errors import CheckpointError
from medsora.models.blocks import LocalAttention, TemporalMamba
from medsora.models.denoiser import Block, Denoiser
from medsora.pipeline import VideoPipeline
from medsora.presets import DENOISERS
from medsora.released import convert_weights, import_released, read_released

Weights = dict[str, Tensor]
WINDOW = 8
FRAMES = 6


# --- The released network, plainly -----------------------------------------------------------------------------------


def position_embedding(side: int, size: int) -> Tensor:
    """(tokens, size): sines and cosines of the column, then of the row."""
    frequencies = [10000.0 ** (-i / (size // 4)) for i in range(size // 4)]
    rows = []
    for row in range(side):
        for column in range(side):
            angles = [[place * frequency for frequency in frequencies] for place in (column, row)]
            rows.append([wave(angle) for line in angles for wave in (math.sin, math.cos) for angle in line])
    return torch.tensor(rows, dtype=torch.float64)


def embed_time(w: Weights, k: int) -> Tensor:
    dtype = w["pos_embed"].dtype
    angles = torch.tensor([k], dtype=dtype) * torch.exp(-math.log(10000) * torch.arange(128, dtype=dtype) / 128)
    x = torch.cat([angles.cos(), angles.sin()])
    x = F.silu(w["t_embedder.mlp.0.weight"] @ x + w["t_embedder.mlp.0.bias"])
    return w["t_embedder.mlp.2.weight"] @ x + w["t_embedder.mlp.2.bias"]


def embed_patches(w: Weights, latents: Tensor) -> Tensor:  # (b f c h w) -> (b f n d)
    kernel = w["x_embedder.proj.weight"]
    images = F.conv2d(latents.flatten(0, 1), kernel, w["x_embedder.proj.bias"], stride=kernel.shape[-1])
    return images.flatten(2).transpose(1, 2).unflatten(0, latents.shape[:2]) + w["pos_embed"]


def turned(vector: Tensor, place: int) -> Tensor:
    half = len(vector) // 2
    angles = place * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos().to(vector.dtype), angles.sin().to(vector.dtype)
    first, second = vector[:half], vector[half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def local_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # each (n d)
    """Window by window: keys of three windows have places 0 to 23, the queries of the middle one 16 to 23."""
    out = torch.zeros_like(value)
    for start in range(0, len(query), WINDOW):
        for offset in range(WINDOW):
            i = start + offset
            near = [
                (place, j)
                for place, j in enumerate(range(start - WINDOW, start + 2 * WINDOW))
                if 0 <= j < len(key) and abs(i - j) <= WINDOW
            ]
            turned_query = turned(query[i], 2 * WINDOW + offset)
            logits = torch.stack([turned_query @ turned(key[j], place) for place, j in near]) / query.shape[1] ** 0.5
            out[i] = logits.softmax(0) @ value[[j for _, j in near]]
    return out


def mamba(w: Weights, name: str, projected: Tensor) -> Tensor:  # (l, projected) -> (l d)
    """One scan, token by token, with its own output projection."""
    heads, d_inner = len(w[f"{name}.A_log"]), len(w[f"{name}.norm.weight"])
    d_state = (len(w[f"{name}.conv1d.bias"]) - d_inner) // 2
    z, conv_in, dt = projected.split([d_inner, d_inner + 2 * d_state, heads], dim=-1)
    conv_in = F.pad(conv_in, (0, 0, 3, 0))
    state = torch.zeros(heads, d_inner // heads, d_state, dtype=projected.dtype)
    outputs = []
    for i in range(len(projected)):
        mixed = (w[f"{name}.conv1d.weight"][:, 0] * conv_in[i : i + 4].T).sum(-1) + w[f"{name}.conv1d.bias"]
        x, B, C = F.silu(mixed).split([d_inner, d_state, d_state])
        x = x.reshape(heads, -1)
        step = F.softplus(dt[i] + w[f"{name}.dt_bias"])[:, None]
        decay = torch.exp(-step * w[f"{name}.A_log"].exp()[:, None])
        state = decay[:, :, None] * state + (step * x)[:, :, None] * B
        y = (state @ C + w[f"{name}.D"][:, None] * x).flatten() * F.silu(z[i])
        y = y / (y.square().mean() + 1e-5).sqrt() * w[f"{name}.norm.weight"]
        outputs.append(w[f"{name}.out_proj.weight"] @ y)
    return torch.stack(outputs)


def ranks(rows: int, columns: int) -> list[tuple[Tensor, Tensor]]:
    """Eight pairs of lists: the rank of each cell in a walk, and in the walk back. A walker that turns at walls."""
    pairs = []
    for headings in ([(0, 1), (1, 0), (0, -1), (-1, 0)], [(1, 0), (0, 1), (-1, 0), (0, -1)]):
        rank, row, column, turn = torch.full((rows, columns), -1), 0, 0, 0
        for number in range(rows * columns):
            rank[row, column] = number
            for _ in range(2):
                down, right = headings[turn % 4]
                ahead = (row + down, column + right)
                if 0 <= ahead[0] < rows and 0 <= ahead[1] < columns and rank[ahead] < 0:
                    break
                turn += 1
            row, column = ahead
        for mirrored in (rank, rank.flip(1), rank.flip(0), rank.flip(0, 1)):
            pairs.append((mirrored.flatten(), rows * columns - 1 - mirrored.flatten()))
    return pairs


def spatial_mamba(w: Weights, block: int, x: Tensor) -> Tensor:  # (b f h w d)
    name = f"blocks.{block}.mamba_hw"
    projected = x @ w[f"{name}.in_proj.weight"].T
    batch, _, height, width, _ = x.shape

    def scanned(plane: Tensor) -> Tensor:  # (frames, columns, projected)
        out = 0
        for rank in ranks(*plane.shape[:2])[block % 8]:
            back = torch.tensor([rank.tolist().index(i) for i in range(len(rank))])
            # the list of ranks is used as if it were the order of the walk
            out = out + mamba(w, name, plane.flatten(0, 1)[rank])[back]
        return out.unflatten(0, plane.shape[:2])  # type: ignore[attr-defined]

    over_width, over_height = torch.zeros_like(x), torch.zeros_like(x)
    for b in range(batch):
        for row in range(height):
            over_width[b, :, row] = scanned(projected[b, :, row])
        for column in range(width):
            over_height[b, :, :, column] = scanned(projected[b, :, :, column])
    fused = torch.zeros_like(x)
    for gate, plane in (("gate_F1", over_width), ("gate_F2", over_height)):
        opened = plane @ w[f"{name}.gated_fusion.{gate}.weight"].T + w[f"{name}.gated_fusion.{gate}.bias"]
        fused = fused + torch.sigmoid(opened) * plane
    return fused


def temporal_mamba(w: Weights, block: int, x: Tensor) -> Tensor:  # (b f n d)
    name = f"blocks.{block}.mamba_f"
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for n in range(x.shape[2]):
            out[b, :, n] = mamba(w, name, x[b, :, n] @ w[f"{name}.in_proj.weight"].T)
    return out


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float, affine: tuple[Tensor, Tensor] | None) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    if affine is not None:
        x = x * affine[0] + affine[1]
    return x * (1 + scale) + shift  # shift and scale of each clip: (b 1 1 d)


def run_block(w: Weights, block: int, x: Tensor, embedding: Tensor) -> Tensor:  # (b f n d), (b d)
    name, side = f"blocks.{block}", math.isqrt(x.shape[2])
    nine = F.silu(embedding) @ w[f"{name}.adaLN_modulation.1.weight"].T + w[f"{name}.adaLN_modulation.1.bias"]
    parts = nine[:, None, None].chunk(9, dim=-1)

    def normed(x: Tensor, number: int) -> Tensor:
        affine = w[f"{name}.norm{number + 1}.weight"], w[f"{name}.norm{number + 1}.bias"]
        return modulated(x, parts[3 * number], parts[3 * number + 1], 1e-5, affine)

    y, attended = normed(x, 0), torch.zeros_like(x)
    for b in range(x.shape[0]):
        for f in range(x.shape[1]):
            projections = (y[b, f] @ w[f"{name}.{kind}_matrix.weight"].T for kind in ("query", "key", "value"))
            attended[b, f] = local_attention(*projections)
    x = x + parts[2] * attended
    x = x + parts[5] * spatial_mamba(w, block, normed(x, 1).unflatten(2, (side, side))).flatten(2, 3)
    return x + parts[8] * temporal_mamba(w, block, normed(x, 2))


def final_layer(w: Weights, x: Tensor, embedding: Tensor, patch: int) -> Tensor:  # (b f n d) -> (b f c h w)
    two = F.silu(embedding) @ w["final_layer.adaLN_modulation.1.weight"].T + w["final_layer.adaLN_modulation.1.bias"]
    shift, scale = two[:, None, None].chunk(2, dim=-1)
    x = modulated(x, shift, scale, 1e-6, None) @ w["final_layer.linear.weight"].T + w["final_layer.linear.bias"]
    side, channels = math.isqrt(x.shape[2]), x.shape[3] // patch**2
    out = torch.zeros(*x.shape[:2], channels, side * patch, side * patch, dtype=x.dtype)
    for n in range(x.shape[2]):
        top, left = n // side * patch, n % side * patch
        for p in range(patch):
            for q in range(patch):
                begin = (p * patch + q) * channels
                out[:, :, :, top + p, left + q] = x[:, :, n, begin : begin + channels]
    return out


def run_network(w: Weights, latents: Tensor, steps: list[int]) -> Tensor:  # (b f c h w)
    embedding = torch.stack([embed_time(w, k) for k in steps])
    x = embed_patches(w, latents)
    for block in range(depth_of(w)):
        x = run_block(w, block, x, embedding)
    return final_layer(w, x, embedding, patch=w["x_embedder.proj.weight"].shape[-1])


def depth_of(w: Weights) -> int:
    return sum(name.endswith("mamba_f.D") for name in w)


# --- Weights ---------------------------------------------------------------------------------------------------------


def released_weights(
    *, depth: int, size: int = 32, channels: int = 4, d_state: int = 8, headdim: int = 16, side: int = 4
) -> Weights:
    """Random weights of the released layout, none at a value that would hide it."""
    d_inner, d_conv_in, heads = 2 * size, 2 * size + 2 * d_state, 2 * size // headdim

    def linear(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) / columns**0.5

    w: Weights = {
        "pos_embed": position_embedding(side, size).float()[None],
        "x_embedder.proj.weight": linear(size, channels * 4).unflatten(1, (channels, 2, 2)),
        "x_embedder.proj.bias": 0.3 * torch.randn(size),
        "t_embedder.mlp.0.weight": linear(size, 256),
        "t_embedder.mlp.0.bias": 0.3 * torch.randn(size),
        "t_embedder.mlp.2.weight": linear(size, size),
        "t_embedder.mlp.2.bias": 0.3 * torch.randn(size),
        "final_layer.linear.weight": linear(8 * channels, size),
        "final_layer.linear.bias": 0.3 * torch.randn(8 * channels),
        "final_layer.adaLN_modulation.1.weight": linear(2 * size, size),
        "final_layer.adaLN_modulation.1.bias": 0.3 * torch.randn(2 * size),
    }
    for i in range(depth):
        block: Weights = {
            "adaLN_modulation.1.weight": linear(9 * size, size),
            "adaLN_modulation.1.bias": 0.3 * torch.randn(9 * size),
            **{f"{kind}_matrix.weight": 2 * linear(size, size) for kind in ("query", "key", "value")},
            "local_attention.rel_pos.inv_freq": 1 / 10000 ** (torch.arange(0, size, 2).float() / size),
            **{f"norm{n}.weight": 1 + 0.3 * torch.randn(size) for n in (1, 2, 3)},
            **{f"norm{n}.bias": 0.3 * torch.randn(size) for n in (1, 2, 3)},
            **{f"mamba_hw.gated_fusion.gate_F{n}.weight": linear(size, size) for n in (1, 2)},
            **{f"mamba_hw.gated_fusion.gate_F{n}.bias": 0.3 * torch.randn(size) for n in (1, 2)},
        }
        for name in ("mamba_hw", "mamba_f"):
            block |= {
                f"{name}.dt_bias": torch.empty(heads).uniform_(-5, -1),
                f"{name}.A_log": torch.empty(heads).uniform_(1, 16).log(),
                f"{name}.D": 1 + 0.3 * torch.randn(heads),
                f"{name}.in_proj.weight": linear(d_inner + d_conv_in + heads, size),
                f"{name}.conv1d.weight": 0.5 * torch.randn(d_conv_in, 1, 4),
                f"{name}.conv1d.bias": 0.3 * torch.randn(d_conv_in),
                f"{name}.norm.weight": 1 + 0.3 * torch.randn(d_inner),
                f"{name}.out_proj.weight": linear(size, d_inner),
            }
        w |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    return w


def doubled(w: Weights) -> Weights:
    return {name: value.double() for name, value in w.items()}


def imported(w: Weights) -> Denoiser:
    config, state = convert_weights(w)
    model = Denoiser(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def run_imported(model: Denoiser, latents: Tensor, steps: list[int]) -> Tensor:  # (b f c h w), as the reference
    t = (torch.tensor(steps, dtype=latents.dtype) / 1000)[:, None].expand(-1, latents.shape[1])
    condition = torch.zeros(len(steps), 0, dtype=torch.long)
    return model(latents.transpose(1, 2), t, condition).transpose(1, 2)


def assert_equal(ours: Tensor, expected: Tensor) -> None:
    """To 1e-10 of the largest value: what is left of float64 after some thousand sums."""
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 1e-10 * expected.abs().max()


# --- One operator after the other ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def small() -> Weights:
    """Ten blocks, so that all eight walks and their repetition are seen."""
    torch.manual_seed(1)
    return released_weights(depth=10)


@pytest.fixture(scope="module")
def full_width() -> Weights:
    """One block of MedSora-B as it is."""
    torch.manual_seed(2)
    return released_weights(depth=1, size=512, channels=16, d_state=128, headdim=64, side=8)


@pytest.fixture(params=["small", "full_width"])
def weights(request: pytest.FixtureRequest) -> Weights:
    return doubled(request.getfixturevalue(request.param))


def block_of(model: Denoiser, index: int) -> Block:
    block = model.blocks[index]
    assert isinstance(block, Block)
    return block


def side_and_size(w: Weights) -> tuple[int, int]:
    return math.isqrt(w["pos_embed"].shape[1]), w["pos_embed"].shape[2]


def random_latents(w: Weights, batch: int = 1) -> Tensor:
    side, channels = side_and_size(w)[0], w["x_embedder.proj.weight"].shape[1]
    return torch.randn(batch, FRAMES, channels, 2 * side, 2 * side, dtype=w["pos_embed"].dtype)


@pytest.mark.parametrize("steps", [[0, 999], [1, 500]])
def test_patches_positions_and_times_enter_alike(weights: Weights, steps: list[int]) -> None:
    model = imported_double(weights)
    seen: list[tuple[Tensor, ...]] = []
    block_of(model, 0).register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    latents = random_latents(weights, batch=2)
    run_imported(model, latents, steps)
    x, embedding = seen[0][:2]
    assert_equal(x.flatten(2, 3), embed_patches(weights, latents))
    expected = torch.stack([embed_time(weights, k) for k in steps])
    assert_equal(embedding, expected[:, None].expand_as(embedding))


def imported_double(w: Weights) -> Denoiser:
    return imported({name: value.float() for name, value in w.items()}).double()


@pytest.mark.parametrize("tokens", [8, 16, 64])
def test_local_attention(weights: Weights, tokens: int) -> None:
    size = side_and_size(weights)[1]
    x = torch.randn(tokens, size, dtype=torch.float64)
    projections = (x @ weights[f"blocks.0.{kind}_matrix.weight"].T for kind in ("query", "key", "value"))
    expected = local_attention(*projections)
    attention = block_of(imported_double(weights), 0).attention
    assert_equal(attention(x[None])[0], expected)
    relative = LocalAttention(size, WINDOW).double()
    relative.load_state_dict(attention.state_dict())
    assert (relative(x[None])[0] - expected).abs().max() > 0.1 * expected.abs().max()


def test_one_scan(weights: Weights) -> None:
    x = torch.randn(37, side_and_size(weights)[1], dtype=torch.float64)
    module = block_of(imported_double(weights), 0).temporal
    assert isinstance(module, TemporalMamba)
    expected = mamba(weights, "blocks.0.mamba_f", x @ weights["blocks.0.mamba_f.in_proj.weight"].T)
    for backend in ("auto", "reference"):
        assert_equal(module(x[None, :, None, None], backend=backend)[0, :, 0, 0], expected)


@pytest.mark.parametrize("block", range(10))
def test_spatial_mamba_of_each_block(small: Weights, block: int) -> None:
    w = doubled(small)
    x = torch.randn(1, FRAMES, 4, 4, 32, dtype=torch.float64)
    module = block_of(imported_double(w), block).spatial
    assert_equal(module(x, backend="auto"), spatial_mamba(w, block, x))


def test_spatial_mamba_at_full_width(full_width: Weights) -> None:
    w = doubled(full_width)
    x = torch.randn(1, FRAMES, 8, 8, 512, dtype=torch.float64)
    module = block_of(imported_double(w), 0).spatial
    assert_equal(module(x, backend="auto"), spatial_mamba(w, 0, x))


def test_the_released_walks_are_16_different_permutations() -> None:
    lists = [tuple(rank.tolist()) for pair in ranks(FRAMES, 8) for rank in pair]
    assert len(set(lists)) == 16
    assert all(sorted(rank) == list(range(48)) for rank in lists)


def test_temporal_mamba(weights: Weights) -> None:
    side, size = side_and_size(weights)
    x = torch.randn(1, FRAMES, side, side, size, dtype=torch.float64)
    module = block_of(imported_double(weights), 0).temporal
    assert_equal(module(x, backend="auto").flatten(2, 3), temporal_mamba(weights, 0, x.flatten(2, 3)))


def test_whole_block(weights: Weights) -> None:
    side, size = side_and_size(weights)
    x = torch.randn(1, FRAMES, side, side, size, dtype=torch.float64)
    embedding = torch.randn(1, size, dtype=torch.float64)
    ours = block_of(imported_double(weights), 0)(x, embedding[:, None].expand(-1, FRAMES, -1), "auto")
    assert_equal(ours.flatten(2, 3), run_block(weights, 0, x.flatten(2, 3), embedding))


def test_final_layer(weights: Weights) -> None:
    model = imported_double(weights)
    seen: list[Tensor] = []
    block_of(model, len(model.blocks) - 1).register_forward_hook(lambda module, inputs, output: seen.append(output))
    predicted = run_imported(model, random_latents(weights), [321])
    embedding = embed_time(weights, 321)[None]
    assert_equal(predicted, final_layer(weights, seen[0].flatten(2, 3), embedding, patch=2))


# --- The whole network -----------------------------------------------------------------------------------------------


def test_whole_network_in_float64(weights: Weights) -> None:
    latents, steps = random_latents(weights, batch=2), [3, 871]
    expected = run_network(weights, latents, steps)
    assert expected.std() > 0.1
    assert_equal(run_imported(imported_double(weights), latents, steps), expected)


@pytest.mark.parametrize("name", ["small", "full_width"])
def test_whole_network_in_float32(name: str, request: pytest.FixtureRequest) -> None:
    w: Weights = request.getfixturevalue(name)
    latents, steps = random_latents(w), [871]
    exact = run_network(doubled(w), latents.double(), steps)
    # what float32 does to the same sums in the plain order is the measure: ours are in another order
    rounding = (run_network(w, latents, steps) - exact).abs()
    away = (run_imported(imported(w), latents, steps) - exact).abs()
    assert rounding.max() < 1e-3 * exact.abs().max()
    assert away.max() <= 2 * rounding.max()
    assert away.square().mean() <= 2 * rounding.square().mean()


def test_moving_average_of_the_positions_is_kept(small: Weights) -> None:
    # as the released training updates it, 3000 times: the fixed embedding goes with it, and shrinks a little
    w = dict(small)
    average, fixed = w["pos_embed"].clone(), w["pos_embed"]
    for _ in range(3000):
        average.mul_(0.9999).add_(fixed, alpha=1 - 0.9999)
    assert 5e-5 < (average - fixed).abs().max() < 2e-4
    w["pos_embed"] = average
    latents = random_latents(w).double()
    assert_equal(run_imported(imported(w).double(), latents, [700]), run_network(doubled(w), latents, [700]))


@pytest.mark.parametrize("depth", [6, 12])
def test_the_shape_is_deduced(depth: int) -> None:
    with torch.device("meta"):
        described = released_weights(depth=depth, size=512, channels=16, d_state=128, headdim=64, side=8)
    assert sum(value.numel() for name, value in described.items() if "inv_freq" not in name) == (
        86_466_304 if depth == 12 else 43_758_784
    )
    if depth == 12:
        from medsora.released import _config_of  # the shape alone: values would take half a gigabyte

        assert _config_of(described) == replace(
            DENOISERS["base"], scan_order="released", local_positions="released", position_grid=(8, 8)
        )


def test_stored_positions_are_of_one_grid(small: Weights) -> None:
    with pytest.raises(ValueError, match="must have 4 x 4 patches, whose positions are stored; got 5 x 4"):
        imported(small)(torch.randn(1, 4, FRAMES, 10, 8), torch.zeros(1, FRAMES), torch.zeros(1, 0, dtype=torch.long))


# --- From a file to a checkpoint -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Weights:
    torch.manual_seed(3)
    return released_weights(depth=2)


@pytest.fixture(scope="module")
def other() -> Weights:
    torch.manual_seed(4)
    return released_weights(depth=2)


@pytest.fixture
def ckpt(tiny: Weights, other: Weights, tmp_path: Path) -> Path:
    """A file as the released training script writes it."""
    path = tmp_path / "0000100.pt"
    optimizer = {"state": {0: {"step": torch.tensor(100.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    arguments = argparse.Namespace(model="MedSora-B", epochs=300, wandb=False)
    torch.save({"model": other, "ema": tiny, "opt": optimizer, "args": arguments}, path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("which", ["ema", "model"])
def test_imported_file_computes_what_the_released_code_does(
    ckpt: Path, tiny: Weights, other: Weights, tmp_path: Path, which: str
) -> None:
    result = run("import-released", ckpt, "--output", tmp_path / "made", "--weights", which)
    assert result.exit_code == 0, result.output
    assert "There is no autoencoder: this checkpoint gives latents, no video" in result.stdout
    loaded = load_checkpoint(tmp_path / "made")
    assert loaded.autoencoder is None
    w = tiny if which == "ema" else other
    latents = random_latents(w).double()
    assert_equal(run_imported(loaded.denoiser.double(), latents, [42]), run_network(doubled(w), latents, [42]))


def test_the_checkpoint_says_what_it_is(ckpt: Path, tmp_path: Path) -> None:
    manifest = import_released(ckpt, tmp_path / "made", name="col", label="colonoscopy", fps=7.5)
    assert load_checkpoint(tmp_path / "made").manifest == manifest
    assert (manifest.name, manifest.label_names, manifest.labels[0].condition) == ("col", ("colonoscopy",), {})
    limits = manifest.limits
    assert (limits.sizes, limits.num_frames, limits.fps) == (((64, 64),), (24,), 7.5)
    assert (limits.num_inference_steps, limits.guidance_scale) == ((2, 250, 1000), (1, 1, 1))
    assert limits.samplers[0] == "ddim"
    assert "Unknown" in manifest.licence
    assert "Research only" in manifest.intended_use
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert names == {"config.json", "denoiser.safetensors", "manifest.json"}
    with safe_open(tmp_path / "made/denoiser.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F32"}  # noqa: SIM118 - no mapping
    shown = run("info", tmp_path / "made")
    assert shown.exit_code == 0, shown.output
    assert "latents only: it has no autoencoder" in shown.stdout
    with pytest.raises(CheckpointError, match="has no autoencoder, and makes latents"):
        VideoPipeline(
            load_checkpoint(tmp_path / "made"), device=torch.device("cpu"), dtype=torch.float32, backend="auto"
        )


def test_an_autoencoder_is_taken_from_another_checkpoint(ckpt: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = run("import-released", ckpt, "--output", tmp_path / "made", "--autoencoder", tiny_checkpoint)
    assert result.exit_code == 0, result.output
    assert "must be the one that the denoiser was trained in" in result.stdout
    theirs, ours = load_checkpoint(tiny_checkpoint).autoencoder, load_checkpoint(tmp_path / "made").autoencoder
    assert theirs is not None
    assert ours is not None
    state = theirs.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


def test_an_autoencoder_that_does_not_fit_is_refused(
    full_width: Weights, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    torch.save({"ema": full_width}, tmp_path / "wide.pt")
    result = run("import-released", tmp_path / "wide.pt", "-o", tmp_path / "made", "--autoencoder", tiny_checkpoint)
    assert result.exit_code == 2
    assert "the autoencoder has 4 latent channels, the denoiser takes 16" in result.stderr
    import_released(tmp_path / "wide.pt", tmp_path / "alone")
    with pytest.raises(CheckpointError, match="alone has no autoencoder"):
        import_released(tmp_path / "wide.pt", tmp_path / "made", autoencoder=tmp_path / "alone")
    assert not (tmp_path / "made").exists()


def test_nothing_is_overwritten(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    result = run("import-released", ckpt, "--output", tmp_path / "made")
    assert result.exit_code == 2
    assert "made exists already; give a new directory" in result.stderr
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "best"], "weights must be one of ema, model, got 'best'"),
        (["--fps", "0"], "fps above 0"),
        (["--fps", "inf"], "Infinity is no number"),
        (["--label", "!"], "labels: '!' of '!' is empty"),
        (["--name", "\x1b[2J"], "control characters"),
    ],
)
def test_bad_options_leave_nothing_behind(ckpt: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = run("import-released", ckpt, "--output", tmp_path / "made", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [ckpt.name]


def test_a_prefix_of_distributed_training_is_taken_off(tiny: Weights, tmp_path: Path) -> None:
    torch.save({"ema": {f"module.{name}": value for name, value in tiny.items()}}, tmp_path / "a.pt")
    assert read_released(tmp_path / "a.pt").keys() == tiny.keys()
    mixed = {f"module.{name}" if "norm" in name else name: value for name, value in tiny.items()}
    with pytest.raises(
        CheckpointError, match=r"lacks tensors, first of 12: blocks\.0\.mamba_f\.norm|lacks tensors, among"
    ):
        convert_weights(mixed)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["beside", "inside", "in the arguments"])
def test_what_would_run_is_refused_and_does_not_run(tiny: Weights, tmp_path: Path, place: str) -> None:
    evil = Evil(tmp_path / "ran")
    content: dict[str, Any] = {"ema": dict(tiny)}
    if place == "beside":
        content["opt"] = evil
    elif place == "inside":
        content["ema"]["pos_embed"] = evil
    else:
        content["args"] = argparse.Namespace(model=evil)
    torch.save(content, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt cannot be read as weights alone"):
        read_released(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}, "step": 3}, "has no state dict 'ema'; it holds: model, step"),
        ({"ema": [1, 2]}, "has no state dict 'ema'; it holds: ema"),
        ([1, 2], "it holds: list"),
        ({"ema": {"a": "text"}}, "'a' of 'ema' is no named tensor"),
        ({"ema": {3: torch.zeros(1)}}, "'3' of 'ema' is no named tensor"),
        ({"ema": {"a": torch.zeros(1, dtype=torch.float16)}}, "tensor a is torch.float16"),
        ({"ema": {"a": torch.zeros(2, 2).to_sparse()}}, "it must be float32"),
        ({"ema": {"a": torch.zeros(1).expand(10**9)}}, "more values than the file holds"),
    ],
)
def test_entries_of_another_kind_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        read_released(tmp_path / "a.pt")


def test_files_of_another_kind_are_refused(ckpt: Path, tiny: Weights, tmp_path: Path) -> None:
    whole = ckpt.read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("weights")
    torch.save({"ema": tiny}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("short.pt", "text.pt", "old.pt"):
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read as weights alone"):
            read_released(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("pipe.pt", "nothing.pt", "."):
        with pytest.raises(CheckpointError, match="is no regular file"):
            read_released(tmp_path / name)


def test_a_file_too_large_is_not_read(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medsora.released.MAX_WEIGHT_BYTES", 1000)
    with pytest.raises(CheckpointError, match="more than the 1000 bytes allowed"):
        read_released(ckpt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("t_embedder.mlp.2.bias"), r"lacks tensors, first of 1: t_embedder\.mlp\.2\.bias"),
        (lambda w: w.pop("pos_embed"), "lacks tensors, among them pos_embed"),
        (lambda w: w.pop("blocks.1.query_matrix.weight"), r"first of 1: blocks\.1\.query_matrix\.weight"),
        (lambda w: w.update(y_embedder=torch.zeros(1)), "has unknown tensors, first of 1: y_embedder"),
        (lambda w: w.update({"blocks.7.D": torch.zeros(1)}), r"lacks tensors, first of \d+: blocks\.2\."),
        (lambda w: w.update({"blocks.0.norm1.bias": torch.zeros(31)}), r"norm1\.bias has shape \(31,\), not \(32,\)"),
        (lambda w: w.update({"x_embedder.proj.weight": torch.zeros(32)}), r"has shape \(32,\), not 4 sizes from 1 on"),
        (lambda w: w.update({"blocks.0.mamba_f.A_log": torch.zeros(0)}), r"has shape \(0,\), not 1 sizes from 1 on"),
        (lambda w: w.update({"blocks.0.mamba_f.A_log": torch.zeros(3)}), "headdim"),
        (lambda w: w.update(pos_embed=torch.zeros(1, 15, 32)), r"pos_embed has shape \(1, 15, 32\), not \(1, 9, 32\)"),
        (
            lambda w: w["final_layer.linear.bias"].fill_(torch.nan),
            r"final_layer\.linear\.bias holds values that are not",
        ),
        (
            lambda w: w["blocks.1.mamba_hw.D"].fill_(torch.inf),
            r"blocks\.1\.mamba_hw\.D holds values that are not finite",
        ),
        (lambda w: w["pos_embed"][0, 3].add_(3e-4), r"pos_embed is no 2-D sine-cosine embedding: 0\.0003 away"),
        (lambda w: w["blocks.1.local_attention.rel_pos.inv_freq"].mul_(1.001), "has other rotary frequencies"),
    ],
)
def test_weights_of_no_released_network_are_refused(
    tiny: Weights, change: Callable[[Weights], object], message: str
) -> None:
    w = {name: value.clone() for name, value in tiny.items()}
    change(w)
    with pytest.raises(CheckpointError, match=message):
        convert_weights(w)


def test_limits_keep_to_the_stored_positions(ckpt: Path, tmp_path: Path) -> None:
    import_released(ckpt, tmp_path / "made")
    copy = Path(shutil.copytree(tmp_path / "made", tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["limits"]["sizes"] = [[64, 64], [128, 64]]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="positions are stored for 64x64 alone"):
        load_checkpoint(copy)
