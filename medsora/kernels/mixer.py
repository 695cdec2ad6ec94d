"""Triton kernels of the Mamba-2 mixer on short sequences: convolution, scan and gate of all walks, and what norms them.

For inference on CUDA; :func:`medsora.ops.mixer.mix_torch` is the twin, which also has gradients. A program takes one
tile of whole sequences (:class:`medsora.ops.walks.Tiles`). Scans are masked matrix products (state-space duality, Dao
and Gu, arXiv 2405.21060): within a tile a walk is a mask of who comes before whom, so no sequence is ever put in order,
and walks in any order share their loads.

Two kernels: ``_scores`` makes what all heads share, once a tile and walk; ``_heads`` makes the heads, each in a program
of its own, so that a single clip fills a GPU too. The norm runs over all heads: ``_heads`` leaves the squares of each
with the unnormed outputs, and torch does the rest.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from medsora.ops.walks import Walks

if TYPE_CHECKING:
    from medsora.ops.mixer import MixerWeights

__all__ = ["gated_scans"]

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp2(x):  # type: ignore[no-untyped-def]
    # one instruction, good to 2 units in the last place; the library's guards results below 1e-38, which here are zero
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _silu(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    if dtype == tl.float32:
        # likewise the reciprocal: a division proper takes ten instructions
        one_and_e = 1.0 + _exp2(-LOG2_E * x)
        result = x * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [one_and_e], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        # x (1 + tanh(x / 2)) / 2: one instruction of the slow unit in place of two, wrong by |x| / 4096 at most,
        # an eighth of what rounding x to bfloat16 does
        half = 0.5 * x
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
        result = half + half * tanh
    return result


@triton.jit
def _stay(x):  # type: ignore[no-untyped-def]
    # keeps the compiler from making x again in each warp of the product that takes it, in place of handing it over
    if x.dtype.primitive_bitwidth == 32:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)
    else:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


@triton.jit
def _convolved(  # type: ignore[no-untyped-def]
    present,
    projected,
    previous,
    tap_stride,
    weight,
    bias,
    channels,
    places,
    WIDTH: tl.constexpr,
    GATE: tl.constexpr,
    CONVOLVED: tl.constexpr,
    TAPS: tl.constexpr,
):
    """SiLU of the causal convolution of some channels at every place of one walk, in float32 (places channels)."""
    total = tl.load(bias + channels).to(tl.float32)[None, :]
    total += present * tl.load(weight + (TAPS - 1) * CONVOLVED + channels).to(tl.float32)[None, :]
    for tap in tl.static_range(1, TAPS):
        token = tl.load(previous + (tap - 1) * tap_stride + places)
        value = tl.load(
            projected + (token[:, None] * WIDTH + GATE + channels[None, :]),
            mask=token[:, None] >= 0,
            other=0.0,
        ).to(tl.float32)
        total += value * tl.load(weight + (TAPS - 1 - tap) * CONVOLVED + channels).to(tl.float32)[None, :]
    return _silu(total, projected.dtype.element_ty)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    projected,
    tokens,
    ranks,
    previous,
    weight,
    bias,
    dt_bias,
    A_log,
    scores,
    decays,
    steps,
    num_tiles,
    num_tokens,
    num_all_tiles,
    LENGTH: tl.constexpr,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
    INNER: tl.constexpr,
    STATE: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of one tile and walk: C B^T where it is causal, the running sums of every head's log-decays, and step sizes."""
    CONVOLVED: tl.constexpr = INNER + 2 * STATE
    WIDTH: tl.constexpr = INNER + CONVOLVED + HEADS
    dtype: tl.constexpr = projected.dtype.element_ty
    tile_of_all, walk = tl.program_id(0), tl.program_id(1)
    tile = tile_of_all % num_tiles
    first_row = (tile_of_all // num_tiles).to(tl.int64) * num_tokens
    projected += first_row * WIDTH  # so that what follows counts in 32 bits
    place = tl.arange(0, SIZE)
    places = tile * SIZE + place
    tap_stride = num_tiles * SIZE
    previous += walk * (TAPS - 1) * tap_stride
    token = tl.load(tokens + places)
    is_real = token >= 0
    rows = tl.maximum(token, 0)
    rank = tl.load(ranks + walk * tap_stride + places)
    before = ((place[:, None] // LENGTH) == (place[None, :] // LENGTH)) & (rank[None, :] <= rank[:, None])
    before = before & is_real[:, None] & is_real[None, :]

    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in tl.static_range(0, STATE, STATE_BLOCK):
        channels = INNER + start + tl.arange(0, STATE_BLOCK)
        present = tl.load(projected + (rows[:, None] * WIDTH + INNER + channels[None, :])).to(tl.float32)
        keys = _convolved(
            present,
            projected,
            previous,
            tap_stride,
            weight,
            bias,
            channels,
            places,
            WIDTH,
            INNER,
            CONVOLVED,
            TAPS,
        ).to(dtype)
        channels += STATE
        present = tl.load(projected + (rows[:, None] * WIDTH + INNER + channels[None, :])).to(tl.float32)
        queries = _convolved(
            present,
            projected,
            previous,
            tap_stride,
            weight,
            bias,
            channels,
            places,
            WIDTH,
            INNER,
            CONVOLVED,
            TAPS,
        ).to(dtype)
        total += tl.dot(_stay(queries), tl.trans(_stay(keys)), input_precision=PRECISION)
    block = walk.to(tl.int64) * num_all_tiles + tile_of_all
    tl.store(scores + block * SIZE * SIZE + place[:, None] * SIZE + place[None, :], tl.where(before, total, 0.0))
    head = tl.arange(0, HEADS_BLOCK)
    is_head = (head < HEADS)[None, :]
    raw = tl.load(projected + (rows[:, None] * WIDTH + INNER + CONVOLVED + head[None, :]), mask=is_head, other=0.0)
    raw = raw.to(tl.float32) + tl.load(dt_bias + head, mask=head < HEADS, other=0.0).to(tl.float32)[None, :]
    step = tl.where(raw > 20.0, raw, tl.log(1.0 + tl.exp(tl.minimum(raw, 20.0))))
    rate = LOG2_E * tl.exp(tl.load(A_log + head, mask=head < HEADS, other=0.0).to(tl.float32))[None, :]
    # tf32x3: three products of rounded parts, as exact as float32, which these exponents need
    decay = tl.dot(_stay(tl.where(before, 1.0, 0.0)), _stay(-rate * step), input_precision="tf32x3")
    offsets = (block * HEADS + head[None, :]) * SIZE + place[:, None]
    tl.store(decays + offsets, decay, mask=is_head)
    tl.store(steps + offsets, step, mask=is_head & (walk == 0))


@triton.jit
def _gated(  # type: ignore[no-untyped-def]
    x, scores, decays, step, gate, skip, place, dtype: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr
):
    """One head of one walk: masked matrix product, skip and gate (places channels)."""
    exponent = tl.load(decays + place)[:, None] - tl.load(decays + place)[None, :]
    causal = tl.load(scores + place[:, None] * SIZE + place[None, :])  # zero where it is not causal
    mixing = causal * _exp2(tl.minimum(exponent, 0.0)) * step[None, :]
    y = tl.dot(_stay(mixing.to(dtype)), _stay(x.to(dtype)), input_precision=PRECISION)
    return (y + skip * x) * gate


@triton.jit
def _heads(  # type: ignore[no-untyped-def]
    projected,
    tokens,
    previous,
    weight,
    bias,
    D,
    scores,
    decays,
    steps,
    gated,
    squares,
    num_tiles,
    num_tokens,
    num_all_tiles,
    num_all_tokens,
    WALKS: tl.constexpr,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
    INNER: tl.constexpr,
    STATE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADDIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One head of one tile: gated outputs of each walk, not yet normed, and the sum of their squares."""
    CONVOLVED: tl.constexpr = INNER + 2 * STATE
    WIDTH: tl.constexpr = INNER + CONVOLVED + HEADS
    dtype: tl.constexpr = projected.dtype.element_ty
    tile_of_all, head = tl.program_id(0), tl.program_id(1)
    tile = tile_of_all % num_tiles
    first_row = (tile_of_all // num_tiles).to(tl.int64) * num_tokens
    projected += first_row * WIDTH  # so that what follows counts in 32 bits
    place = tl.arange(0, SIZE)
    places = tile * SIZE + place
    tap_stride = num_tiles * SIZE
    token = tl.load(tokens + places)
    is_real = token >= 0
    rows = tl.maximum(token, 0)
    channels = head * HEADDIM + tl.arange(0, HEADDIM)
    z = tl.load(projected + (rows[:, None] * WIDTH + channels[None, :])).to(tl.float32)
    gate = _silu(z, dtype)
    present = tl.load(projected + (rows[:, None] * WIDTH + INNER + channels[None, :])).to(tl.float32)
    skip = tl.load(D + head).to(tl.float32)
    step = tl.load(steps + (tile_of_all.to(tl.int64) * HEADS + head) * SIZE + place)
    for walk in tl.static_range(WALKS):
        block = tile_of_all.to(tl.int64) + walk * num_all_tiles
        x = _convolved(
            present,
            projected,
            previous + walk * (TAPS - 1) * tap_stride,
            tap_stride,
            weight,
            bias,
            channels,
            places,
            WIDTH,
            INNER,
            CONVOLVED,
            TAPS,
        )
        result = _gated(
            x,
            scores + block * SIZE * SIZE,
            decays + (block * HEADS + head) * SIZE,
            step,
            gate,
            skip,
            place,
            dtype,
            SIZE,
            PRECISION,
        )
        out_row = first_row + walk * num_all_tokens
        out = gated + out_row * INNER + (rows[:, None] * INNER + channels[None, :])
        tl.store(out, result.to(dtype), mask=is_real[:, None])
        tl.store(squares + out_row * HEADS + (rows * HEADS + head), tl.sum(result * result, axis=1), mask=is_real)


def _outputs(projected: Tensor, *, num_walks: int, num_heads: int, convolved: int) -> tuple[Tensor, Tensor]:
    batch, num_tokens, width = projected.shape
    gated = projected.new_empty(num_walks, batch, num_tokens, width - convolved - num_heads)
    squares = projected.new_empty(num_walks, batch, num_tokens, num_heads, dtype=torch.float32)
    return gated, squares


# opaque to the compiler: its analysis of what a kernel writes gives up at inline assembly, and copies every input
@custom_op("medsora::gated_scans", mutates_args=())
def _gated_scans(
    projected: Tensor,
    tokens: Tensor,
    ranks: Tensor,
    previous: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    length: int,
) -> tuple[Tensor, Tensor]:
    projected = projected.contiguous()  # the kernels count in its rows, and a compiler may pad them
    batch, num_tokens, width = projected.shape
    num_walks, num_tiles, size = ranks.shape
    taps, num_heads = conv_weight.shape[0], A_log.shape[0]
    d_inner = width - conv_weight.shape[1] - num_heads
    d_state = (conv_weight.shape[1] - d_inner) // 2
    tiles = batch * num_tiles
    precision = "ieee" if projected.dtype == torch.float32 else "tf32"
    scores = projected.new_empty(num_walks, tiles, size, size, dtype=torch.float32)
    decays = projected.new_empty(num_walks, tiles, num_heads, size, dtype=torch.float32)
    steps = projected.new_empty(tiles, num_heads, size, dtype=torch.float32)
    _scores[(tiles, num_walks)](
        projected,
        tokens,
        ranks,
        previous,
        conv_weight,
        conv_bias,
        dt_bias,
        A_log,
        scores,
        decays,
        steps,
        num_tiles,
        num_tokens,
        tiles,
        LENGTH=length,
        SIZE=size,
        TAPS=taps,
        INNER=d_inner,
        STATE=d_state,
        STATE_BLOCK=min(d_state, 64),
        HEADS=num_heads,
        HEADS_BLOCK=max(16, 1 << (num_heads - 1).bit_length()),
        PRECISION=precision,
        num_warps=4 if size <= 64 else 8,
        num_stages=1,
    )
    gated, squares = _outputs(projected, num_walks=num_walks, num_heads=num_heads, convolved=conv_weight.shape[1])
    _heads[(tiles, num_heads)](
        projected,
        tokens,
        previous,
        conv_weight,
        conv_bias,
        D,
        scores,
        decays,
        steps,
        gated,
        squares,
        num_tiles,
        num_tokens,
        tiles,
        batch * num_tokens,
        WALKS=num_walks,
        SIZE=size,
        TAPS=taps,
        INNER=d_inner,
        STATE=d_state,
        HEADS=num_heads,
        HEADDIM=d_inner // num_heads,
        PRECISION=precision,
        num_warps=4 if size <= 64 else 8,
        num_stages=1,
    )
    return gated, squares


@_gated_scans.register_fake
def _gated_scans_shapes(
    projected: Tensor,
    tokens: Tensor,
    ranks: Tensor,
    previous: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    length: int,
) -> tuple[Tensor, Tensor]:
    return _outputs(projected, num_walks=ranks.shape[0], num_heads=A_log.shape[0], convolved=conv_weight.shape[1])


def gated_scans(projected: Tensor, walks: Walks, weights: "MixerWeights") -> tuple[Tensor, Tensor]:
    """Run the kernels.

    Args:
        projected: (b n p), as :func:`medsora.ops.mixer.mix` takes it; for limits see its ``can_fuse``.

    Returns:
        Gated outputs of each walk before the norm (k b n i), and sums of their squares over each head (k b n heads).
    """
    tiles = walks.tiles(weights.conv_weight.shape[1] - 1)
    gated: Tensor
    squares: Tensor
    gated, squares = _gated_scans(
        projected,
        tiles.tokens,
        tiles.ranks,
        tiles.previous,
        weights.conv_weight.T.contiguous(),
        weights.conv_bias,
        weights.dt_bias,
        weights.A_log,
        weights.D,
        tiles.length,
    )
    return gated, squares
