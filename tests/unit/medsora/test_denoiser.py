"""The denoiser as a whole."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsora.models.denoiser import Block, Denoiser, sinusoids
from medsora.presets import DENOISERS


def lively(**changes: object) -> Denoiser:
    """A tiny denoiser whose zero-initialised parts are random, so that everything reaches the output."""
    model = Denoiser(replace(DENOISERS["tiny"], condition_sizes=(3, 2), **changes))  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def waves(position: float, size: int) -> Tensor:
    """``size / 2`` cosines, then as many sines, at frequencies from 1 down towards 1e-4."""
    angles = [position * 10000.0 ** (-i / (size // 2)) for i in range(size // 2)]
    return torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)


def written_out(model: Denoiser, latents: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """The network token by token in float64, from the paper's description; only the three mixers are taken as given."""
    weights, patch = model.state_dict(), model.config.patch_size
    size, (batch, _, frames, height, width) = model.config.hidden_size, latents.shape
    rows, columns = height // patch, width // patch

    # patch embedding: a convolution with kernel and stride of one patch; then fixed positions, none in time
    kernel = weights["patch_in.weight"].unflatten(1, (latents.shape[1], patch, patch))
    images = latents.transpose(1, 2).flatten(0, 1)
    x = F.conv2d(images, kernel, weights["patch_in.bias"], stride=patch).unflatten(0, (batch, frames))
    x = x.movedim(2, -1)  # b f h w d
    for row in range(rows):
        for column in range(columns):
            x[:, :, row, column] += torch.cat([waves(row, size // 2), waves(column, size // 2)])

    # time, spread to [0, 1000], of each frame; plus one embedding a condition
    embedding = torch.zeros(batch, frames, size, dtype=torch.float64)
    for b in range(batch):
        for f in range(frames):
            embedding[b, f] = model.time_out(F.silu(model.time_in(waves(1000 * t[b, f].item(), 256))))
            for index in range(condition.shape[1]):
                embedding[b, f] += weights[f"conditions.{index}.weight"][condition[b, index]]

    def modulated(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        normed = (x - mean) / (variance + (1e-5 if norm.elementwise_affine else 1e-6)).sqrt()
        if norm.elementwise_affine:
            normed = normed * norm.weight + norm.bias
        return normed * (1 + scale[:, :, None, None]) + shift[:, :, None, None]

    for block in model.blocks:
        assert isinstance(block, Block)
        # shift, scale and gate of attention, then of the spatial, then of the temporal Mamba
        nine = block.modulation.up(F.silu(embedding)).unflatten(-1, (9, size)).unbind(-2)
        y = modulated(block.norm1, x, nine[0], nine[1])
        attended = torch.zeros_like(x)
        for b in range(batch):
            for f in range(frames):  # tokens of a frame in raster order: row by row
                raster = torch.stack([y[b, f, i // columns, i % columns] for i in range(rows * columns)])
                out = block.attention(raster[None])[0]
                for i in range(rows * columns):
                    attended[b, f, i // columns, i % columns] = out[i]
        x = x + nine[2][:, :, None, None] * attended
        spatial = block.spatial(modulated(block.norm2, x, nine[3], nine[4]), backend="reference")
        x = x + nine[5][:, :, None, None] * spatial
        temporal = block.temporal(modulated(block.norm3, x, nine[6], nine[7]), backend="reference")
        x = x + nine[8][:, :, None, None] * temporal

    shift, scale = model.modulation_out.up(F.silu(embedding)).unflatten(-1, (2, size)).unbind(-2)
    x = modulated(model.norm_out, x, shift, scale).movedim(-1, 2).flatten(0, 1)
    # back to pixels of the latents: the transposed convolution, again of one patch
    kernel = weights["patch_out.weight"].T.unflatten(1, (model.config.out_channels, patch, patch))
    bias = weights["patch_out.bias"].unflatten(0, (model.config.out_channels, patch, patch))
    pixels = F.conv_transpose2d(x, kernel, stride=patch) + bias.repeat(1, rows, columns)
    return pixels.unflatten(0, (batch, frames)).transpose(1, 2)


@torch.no_grad()
def test_network_equals_its_description_token_by_token() -> None:
    model = lively().double()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and ("norm" in name or "bias" in name):  # nothing at its initial 0 or 1
            parameter += 0.3 * torch.randn_like(parameter)
    latents = torch.randn(2, 4, 3, 4, 6, dtype=torch.float64)  # more columns than rows
    t = torch.tensor([[0.0, 0.3, 1.0], [0.7, 0.7, 0.1]], dtype=torch.float64)
    condition = torch.tensor([[0, 1], [3, 2]])
    expected = written_out(model, latents, t, condition)
    assert expected.std() > 0.1
    assert torch.allclose(model(latents, t, condition), expected, rtol=1e-9, atol=1e-10)


def test_each_mixer_reads_its_own_third_of_the_modulation() -> None:
    size = DENOISERS["tiny"].hidden_size
    block = Denoiser(DENOISERS["tiny"]).blocks[0]
    assert isinstance(block, Block)
    x, embedding = torch.randn(1, 2, 3, 4, size), torch.randn(1, 2, size)
    assert torch.equal(block(x, embedding, "auto"), x)  # all gates closed
    for third, mixer in enumerate((block.attention, block.spatial, block.temporal)):
        nn.init.zeros_(block.modulation.up.bias)
        block.modulation.up.bias.data[(3 * third + 2) * size : (3 * third + 3) * size] = 2.0
        seen: list[Tensor] = []
        handle = mixer.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        change = block(x, embedding, "auto") - x
        handle.remove()
        assert torch.allclose(change, 2 * seen[0].reshape(x.shape), atol=1e-5)


def test_a_condition_has_one_class_more_than_its_values() -> None:
    model = Denoiser(replace(DENOISERS["tiny"], condition_sizes=(3, 2)))
    assert [tuple(table.weight.shape) for table in model.conditions] == [(4, 32), (3, 32)]
    null = torch.tensor([model.config.null_condition])
    assert torch.isfinite(model(torch.randn(1, 4, 2, 4, 4), torch.rand(1, 2), null)).all()


def test_untrained_network_predicts_nothing() -> None:
    model = Denoiser(replace(DENOISERS["tiny"], condition_sizes=(3,)))
    velocity = model(torch.randn(2, 4, 4, 8, 8), torch.rand(2, 4), torch.tensor([[0], [3]]))
    assert torch.equal(velocity, torch.zeros(2, 4, 4, 8, 8))


@pytest.mark.parametrize("shape", [(2, 4, 4), (4, 8, 8), (6, 6, 10)])
def test_takes_any_number_of_frames_and_any_grid(shape: tuple[int, int, int]) -> None:
    model = lively()
    latents = torch.randn(2, 4, *shape)
    velocity = model(latents, torch.rand(2, shape[0]), torch.tensor([[0, 1], [3, 2]]))
    assert velocity.shape == latents.shape
    assert torch.isfinite(velocity).all()


def test_clips_of_a_batch_do_not_touch_each_other() -> None:
    model, t = lively(), torch.rand(3, 4)
    latents, condition = torch.randn(3, 4, 4, 8, 8), torch.tensor([[0, 0], [1, 1], [3, 2]])
    together = model(latents, t, condition)
    for b in range(3):
        alone = model(latents[b : b + 1], t[b : b + 1], condition[b : b + 1])
        assert torch.allclose(together[b : b + 1], alone, atol=1e-4)


def test_condition_and_each_frames_time_matter() -> None:
    model, latents = lively(), torch.randn(1, 4, 4, 8, 8)
    t, condition = torch.full((1, 4), 0.5), torch.tensor([[0, 0]])
    base = model(latents, t, condition)
    assert not torch.allclose(base, model(latents, t, torch.tensor([[1, 0]])))
    assert not torch.allclose(base, model(latents, t, torch.tensor([[0, 2]])))
    for frame in range(4):
        other = t.clone()
        other[0, frame] = 0
        assert not torch.allclose(base, model(latents, other, condition))


@pytest.mark.parametrize("backend", ["dual", "chunked", "reference"])
def test_back_ends_agree(backend: str) -> None:
    model, latents, t = lively(), torch.randn(1, 4, 4, 8, 8), torch.rand(1, 4)
    condition = torch.tensor([[2, 1]])
    expected = model(latents, t, condition)
    model.backend = backend
    assert torch.allclose(model(latents, t, condition), expected, atol=1e-4)


def test_every_parameter_learns() -> None:
    model = lively(modulation_rank=4).train()
    model(torch.randn(2, 4, 4, 8, 8), torch.rand(2, 4), torch.tensor([[0, 1], [3, 2]])).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_blocks_rotate_through_the_eight_spirals() -> None:
    model = Denoiser(replace(DENOISERS["tiny"], depth=10))
    assert [block.spatial.spiral for block in model.blocks] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]  # type: ignore[union-attr]


def test_the_steps_of_ddpm_are_whole_numbers_to_the_network() -> None:
    model = lively(prediction="noise", out_channels=8)
    k = torch.arange(1000.0)
    t = k / 1000
    assert (t * 1000 != k).any()  # which is why it rounds
    seen: list[Tensor] = []
    model.time_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    condition = torch.tensor([model.config.null_condition])
    for times in t.split(50):
        model(torch.randn(1, 4, 50, 2, 2), times[None], condition)
    assert torch.allclose(torch.cat(seen, dim=1)[0], sinusoids(k, 256), rtol=0, atol=1e-6)


def test_noise_comes_with_a_value_for_its_variance() -> None:
    model = lively(prediction="noise", out_channels=8)
    predicted = model(torch.randn(2, 4, 3, 4, 4), torch.rand(2, 3), torch.tensor([[0, 1], [3, 2]]))
    assert predicted.shape == (2, 8, 3, 4, 4)
    assert DENOISERS["base"].prediction == "noise"


def test_base_has_the_published_number_of_parameters() -> None:
    # 86,466,304 counts the fixed 64 x 512 position embedding, which here is computed, not stored
    with torch.device("meta"):
        model = Denoiser(DENOISERS["base"])
    assert sum(p.numel() for p in model.parameters()) + 64 * 512 == 86_466_304


COMPILES = """
from dataclasses import replace
import torch
from medsora.models.denoiser import Denoiser
from medsora.presets import DENOISERS

torch.manual_seed(0)
model = Denoiser(replace(DENOISERS["tiny"], condition_sizes=(3, 2))).eval()
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.1)
latents, t, condition = torch.randn(2, 4, 4, 8, 8), torch.rand(2, 4), torch.tensor([[0, 1], [3, 2]])
# aot_eager traces the whole network without graph breaks, and needs no C++ compiler
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
assert torch.allclose(compiled(latents, t, condition), model(latents, t, condition), atol=1e-5)
"""


def test_compiled_equals_eager() -> None:
    # in a process of its own: the checks of shapes that the tests run with cannot be compiled
    result = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr
