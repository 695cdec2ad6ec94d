"""The selective scan of Mamba-1 (Gu and Dao, arXiv 2312.00752), with several back ends of one signature.

For each channel, with its own decays a_i = exp(dt_i A) and its own state h of ``d_state`` values at step i:

    h_i = a_i * h_{i-1} + dt_i x_i B_i          y_i = h_i . C_i + D x_i

``reference`` runs this loop in float64. ``chunked`` runs a parallel prefix scan inside chunks and carries the state
between them, on any device; it keeps the states of one chunk at a time, in training too. ``mamba_ssm`` is the
authors' CUDA kernel, from the package mamba-ssm. Gate, bias and softplus of the Mamba-1 layer stay outside.

Axis letters: b batch, l length, d channels, s state.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medsora.errors import BackendError
from medsora.ops.backends import load_kernels, not_traced, resolve_backend
from medsora.ops.ssd import at_least_float32

__all__ = [
    "SCAN_BACKENDS",
    "selective_scan",
    "selective_scan_chunked",
    "selective_scan_mamba_ssm",
    "selective_scan_reference",
]

CHUNK_SIZES = (64, 32, 16, 8, 4)
CPU_STATE_VALUES, GPU_STATE_VALUES = 2**19, 2**26
"""Values that the states of one chunk may have: on a CPU to stay in its cache, on a GPU to leave memory for others."""
MAX_KERNEL_STATE = 256

X = Float[Tensor, "b l d"]
A_ = Float[Tensor, "d s"]
BC = Float[Tensor, "b l s"]
D_ = Float[Tensor, " d"]


def selective_scan_reference(x: X, dt: X, A: A_, B: BC, C: BC, D: D_ | None = None) -> X:
    """The loop of the module's definition, in float64; the yardstick of the others. See :func:`selective_scan`."""
    dtype = x.dtype
    x, dt, A, B, C = x.double(), dt.double(), A.double(), B.double(), C.double()
    state = x.new_zeros(x.shape[0], *A.shape)  # b d s
    outputs = []
    for i in range(x.shape[1]):
        step = dt[:, i, :, None]
        state = torch.exp(step * A) * state + step * x[:, i, :, None] * B[:, i, None]
        outputs.append(torch.einsum("bds,bs->bd", state, C[:, i]))
    y = torch.stack(outputs, dim=1)
    return (y if D is None else y + D.double() * x).to(dtype)


def selective_scan_chunked(
    x: X, dt: X, A: A_, B: BC, C: BC, D: D_ | None = None, *, chunk_size: int | None = None
) -> X:
    """Prefix scans inside chunks, state carried between them: any device. See :func:`selective_scan`."""
    dtype, step_values = x.dtype, x.shape[0] * A.numel()
    if chunk_size is None:
        limit = CPU_STATE_VALUES if x.device.type == "cpu" else GPU_STATE_VALUES
        chunk_size = next((size for size in CHUNK_SIZES if size * step_values <= limit), CHUNK_SIZES[-1])
    x, dt, A, B, C = (at_least_float32(value) for value in (x, dt, A, B, C))
    state = (x.new_zeros(()) + A.new_zeros(())).expand(x.shape[0], *A.shape)
    outputs = []
    # split, not sliced one by one: each slice's gradient would be as long as the whole
    chunks = zip(*(torch.split(value, chunk_size, dim=1) for value in (x, dt, B, C)), strict=True)
    for x_chunk, dt_chunk, B_chunk, C_chunk in chunks:
        operands = (state, x_chunk, dt_chunk, A, B_chunk, C_chunk)
        if torch.is_grad_enabled():  # states are made again in the backward pass: memory of one chunk, not of all
            y, state = checkpoint(_scan_chunk, *operands, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _scan_chunk(*operands)
        outputs.append(y)
    y = torch.cat(outputs, dim=1)
    return (y if D is None else y + at_least_float32(D) * x).to(dtype)


def _scan_chunk(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of a chunk (b l d) and the state after it (b d s).

    Doubling (Hillis and Steele): after each round every place holds the sum over twice as many steps. Decays are only
    ever multiplied; dividing by their products, or adding their logarithms up, loses all digits.
    """
    decay = torch.exp(dt[..., None] * A)  # b l d s
    total = (dt * x)[..., None] * B[:, :, None]
    total = torch.cat([total[:, :1] + decay[:, :1] * state[:, None], total[:, 1:]], dim=1)
    reach = 1
    while reach < x.shape[1]:
        total = torch.cat([total[:, :reach], total[:, reach:] + decay[:, reach:] * total[:, :-reach]], dim=1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], dim=1)
        reach *= 2
    return torch.einsum("blds,bls->bld", total, C), total[:, -1]


@not_traced  # a compiled extension that no compiler can trace
def selective_scan_mamba_ssm(x: X, dt: X, A: A_, B: BC, C: BC, D: D_ | None = None) -> X:
    """The kernel of the package mamba-ssm; sums in float32. See :func:`selective_scan`."""
    if x.device.type != "cuda":
        raise BackendError(f"back end mamba_ssm needs tensors on a CUDA device, got {x.device}")
    # it takes x, dt, B and C in one type: that of dt where it is the finer one
    dtype = torch.promote_types(x.dtype, dt.dtype)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise BackendError(f"back end mamba_ssm takes float32, bfloat16 or float16, got {dtype}")
    if A.shape[1] > MAX_KERNEL_STATE:
        raise BackendError(f"back end mamba_ssm takes a state of at most {MAX_KERNEL_STATE}, got {A.shape[1]}")
    scan = load_kernels("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    channels_first = (rearrange(value.to(dtype), "b l c -> b c l").contiguous() for value in (x, dt, B, C))
    inputs, steps, keys, queries = channels_first
    y: Tensor = scan(inputs, steps, A.float(), keys, queries, None if D is None else D.float())
    return rearrange(y, "b d l -> b l d").to(x.dtype)


SCAN_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": selective_scan_reference,
    "chunked": selective_scan_chunked,
    "mamba_ssm": selective_scan_mamba_ssm,
}


def selective_scan(x: X, dt: X, A: A_, B: BC, C: BC, D: D_ | None = None, *, backend: str = "auto") -> X:
    """Selective scan over the second axis.

    Args:
        x: Inputs, one value a channel and step.
        dt: Step sizes, positive (after softplus and bias).
        A: Decay rates of each channel's state, negative.
        B: Input projections, shared by all channels.
        C: Output projections, shared by all channels.
        D: Skip weight of each channel; None is none.
        backend: ``auto`` (see :mod:`medsora.ops.backends`), ``reference``, ``chunked`` or ``mamba_ssm``.

    Returns:
        Outputs of the shape and dtype of ``x``.

    Raises:
        BackendError: No such back end, or it cannot run here.

    Source: Gu and Dao, arXiv 2312.00752 (selective state spaces).
    """
    chosen = resolve_backend(
        backend, operator="selective_scan", length=x.shape[1], batch=x.shape[0], device=x.device, dtype=x.dtype
    )
    return SCAN_BACKENDS[chosen](x, dt, A, B, C, D)
