"""The inside of a Mamba-2 mixer: causal convolution, state-space scan, gate and norm, over one or more walks.

Between the two projections of Mamba-2 (Dao and Gu, arXiv 2405.21060, the parallel block), on tokens that are already
projected to gate z, convolution input (x, B, C) and step size dt, side by side. The walks' outputs are summed in place,
token by token: the output projection has no bias, so summing before it is exact and saves a product a walk.

``mix_torch`` puts the sequences in order and calls :func:`medsora.ops.ssd.ssd`; it runs anywhere and has gradients.
``fused`` is made of Triton kernels for short sequences on CUDA, without gradients.

Axis letters: b clips, n tokens of a clip, p projected channels, i inner channels, k walks, s sequences, l steps.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from medsora.errors import BackendError
from medsora.ops.backends import constant_when_traced, resolve_backend
from medsora.ops.ssd import at_least_float32, ssd
from medsora.ops.walks import Walks

__all__ = ["NORM_EPS", "MixerWeights", "can_fuse", "mix", "mix_torch"]

NORM_EPS = 1e-5
MAX_FUSED_LENGTH = 128
"""Longest sequence of the fused kernel: the mask of a tile is kept in registers."""
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class MixerWeights:
    """The parameters between Mamba-2's projections; their shapes say all sizes."""

    conv_weight: Float[Tensor, "c taps"]
    """Depthwise kernel over x, B and C; the last tap is the present step."""
    conv_bias: Float[Tensor, " c"]
    dt_bias: Float[Tensor, " heads"]
    A_log: Float[Tensor, " heads"]
    D: Float[Tensor, " heads"]
    norm_gain: Float[Tensor, " i"]

    @property
    def d_inner(self) -> int:
        """Width of the gate and of the output."""
        return self.norm_gain.shape[0]

    @property
    def d_state(self) -> int:
        """Size of a head's state: B and C have as many channels each."""
        return (self.conv_weight.shape[0] - self.d_inner) // 2

    @property
    def headdim(self) -> int:
        """Channels of a head."""
        return self.d_inner // self.A_log.shape[0]


def _causal_convolution(
    x: Float[Tensor, "b l c"], weight: Float[Tensor, "c taps"], bias: Float[Tensor, " c"]
) -> Tensor:
    taps = weight.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    weight = weight.to(x.dtype)
    # sum of shifted products: no transposes, and a compiler fuses it with what is around
    shifted = (padded[:, k : k + x.shape[1]] * weight[:, k] for k in range(taps))
    return bias.to(x.dtype) + sum(shifted)


def _scan(projected: Float[Tensor, "b l p"], weights: MixerWeights, backend: str) -> Float[Tensor, "b l i"]:
    """One sequence of projected tokens in order: causal convolution, SSD, gated norm."""
    d_inner, d_state = weights.d_inner, weights.d_state
    z, conv_in, dt = torch.split(projected, [d_inner, weights.conv_weight.shape[0], weights.A_log.shape[0]], dim=-1)
    mixed = F.silu(_causal_convolution(conv_in, weights.conv_weight, weights.conv_bias))
    x, B, C = torch.split(mixed, [d_inner, d_state, d_state], dim=-1)
    y = ssd(
        rearrange(x, "b l (k e) -> b l k e", e=weights.headdim),
        F.softplus(at_least_float32(dt) + at_least_float32(weights.dt_bias)),
        -torch.exp(at_least_float32(weights.A_log)),
        rearrange(B, "b l s -> b l 1 s"),
        rearrange(C, "b l s -> b l 1 s"),
        weights.D,
        backend=backend,
    )
    gated = y.flatten(2) * F.silu(z)
    scale = at_least_float32(gated).square().mean(dim=-1, keepdim=True).add(NORM_EPS).rsqrt()
    return gated * scale.to(gated.dtype) * weights.norm_gain.to(gated.dtype)


def mix_torch(
    projected: Float[Tensor, "b n p"], walks: Walks, weights: MixerWeights, *, backend: str = "auto"
) -> Float[Tensor, "b n i"]:
    """The mixer with torch's operators; ``backend`` is that of :func:`medsora.ops.ssd.ssd`. See :func:`mix`."""
    k, s, l = walks.visits.shape  # noqa: E741 - the letters of the module
    in_order = rearrange(projected[:, walks.visits.flatten()], "b (k s l) p -> (k b s) l p", k=k, s=s, l=l)
    scanned = rearrange(_scan(in_order, weights, backend), "(k b s) l i -> k b (s l) i", k=k, s=s)
    in_place = [scanned[walk][:, walks.returns[walk]] for walk in range(k)]
    return sum(in_place[1:], in_place[0])


def mix_fused(projected: Float[Tensor, "b n p"], walks: Walks, weights: MixerWeights) -> Float[Tensor, "b n i"]:
    """The mixer by kernels of our own, all but its norm; see :func:`mix`, and :func:`can_fuse` for its limits."""
    from medsora.kernels.mixer import gated_scans

    gated, squares = gated_scans(projected, walks, weights)
    scale = (squares.sum(dim=-1, keepdim=True) / weights.d_inner + NORM_EPS).rsqrt()
    return ((gated * scale).sum(dim=0) * weights.norm_gain).to(projected.dtype)


def can_fuse(walks: Walks, weights: MixerWeights, projected: Tensor) -> str | None:
    """Why the fused kernel cannot run these operands; None if it can."""
    sizes = {"headdim": weights.headdim, "d_state": weights.d_state}
    if projected.device.type != "cuda":
        return f"it needs tensors on a CUDA device, got {projected.device}"
    if torch.is_grad_enabled() and (projected.requires_grad or weights.norm_gain.requires_grad):
        return "it has no gradients"
    if projected.dtype not in FUSED_DTYPES:
        return f"it takes bfloat16, float16 or float32, got {projected.dtype}"
    if walks.length > MAX_FUSED_LENGTH:
        return f"it takes sequences of at most {MAX_FUSED_LENGTH}, got {walks.length}"
    if walks.num_walks > 2:
        return f"it takes one walk or two, got {walks.num_walks}"
    if any(size < 16 or size & (size - 1) for size in sizes.values()):
        return f"it takes powers of two from 16 on, got {sizes}"
    return _kernel_problem()


@constant_when_traced
def _kernel_problem() -> str | None:
    return _import_problem()


@cache
def _import_problem() -> str | None:
    try:
        import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); it comes with torch for CUDA"
    return None


def mix(
    projected: Float[Tensor, "b n p"], walks: Walks, weights: MixerWeights, *, backend: str = "auto"
) -> Float[Tensor, "b n i"]:
    """Mix the projected tokens of each clip along the walks.

    Args:
        projected: Gate z, convolution input (x, B, C) and dt of every token, side by side.
        backend: ``auto``, ``fused``, or a back end of :func:`medsora.ops.ssd.ssd`.

    Returns:
        Normed outputs at each token, summed over the walks; to be merged by the output projection.

    Raises:
        BackendError: No such back end, or it cannot run these operands here.
    """
    chosen = resolve_backend(
        backend,
        operator="mixer",
        length=walks.length,
        batch=projected.shape[0] * walks.num_sequences * walks.num_walks,
        device=projected.device,
        dtype=projected.dtype,
    )
    if chosen != "fused":
        return mix_torch(projected, walks, weights, backend=chosen)
    problem = can_fuse(walks, weights, projected)
    if problem is None:
        return mix_fused(projected, walks, weights)
    if backend == "fused":
        raise BackendError(f"back end fused cannot run here: {problem}")
    return mix_torch(projected, walks, weights)
