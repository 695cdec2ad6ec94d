"""The state-space dual operator of Mamba-2 (Dao and Gu, arXiv 2405.21060), with several back ends of one signature.

For each head, with a scalar decay a_i = exp(dt_i A) at step i, and state h of shape (headdim, d_state):

    h_i = a_i h_{i-1} + dt_i x_i B_i^T          y_i = h_i C_i + D x_i

``reference`` runs this loop in float64. ``dual`` computes the equal masked matrix product
y = (L * C B^T) (dt x), L_ij = a_{j+1} ... a_i for j <= i: no loop, cost quadratic in length, best for short
sequences. ``chunked`` runs the dual form inside chunks and carries the state between them: linear in length.
``mamba_ssm`` does the same in the authors' Triton kernels: CUDA only, from the package mamba-ssm.

Axis letters: b batch, l length, k heads, e head dimension, g groups of heads that share B and C, s state.
"""

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from medsora.errors import BackendError
from medsora.ops.backends import load_kernels, not_traced, resolve_backend

__all__ = ["BACKENDS", "ssd", "ssd_chunked", "ssd_dual", "ssd_mamba_ssm", "ssd_reference"]

CHUNK_SIZE = 64
KERNEL_CHUNK_SIZES = (64, 256)
MAX_KERNEL_CHUNKS = 65535
"""Sequences times chunks of one launch: the second axis of a CUDA grid holds no more."""

X = Float[Tensor, "b l k e"]
DT = Float[Tensor, "b l k"]
A_ = Float[Tensor, " k"]
BC = Float[Tensor, "b l g s"]


def at_least_float32(value: Tensor) -> Tensor:
    """``value`` in float32, or float64 where it is that already: step sizes and decays bear no less."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _decay_mask(log_decay: Float[Tensor, "... l"]) -> Float[Tensor, "... l l"]:
    """Matrix with exp(log_decay[j+1] + ... + log_decay[i]) at (i, j) for j <= i, zero above the diagonal.

    Differences of one cumulative sum: exponents are at most 0 (decays are at most 1), so nothing overflows.
    """
    total = log_decay.cumsum(dim=-1)
    exponent = total[..., :, None] - total[..., None, :]
    length = log_decay.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=log_decay.device).tril()
    return exponent.masked_fill(~causal, -torch.inf).exp()


def _per_head(groups: Tensor, num_heads: int) -> Tensor:
    return repeat(groups, "b l g s -> b l (g r) s", r=num_heads // groups.shape[2])


def ssd_reference(x: X, dt: DT, A: A_, B: BC, C: BC, D: A_ | None = None) -> X:
    """The loop of the module's definition, in float64; the yardstick of the other forms. See :func:`ssd`."""
    dtype, num_heads = x.dtype, x.shape[2]
    x, dt, A = x.double(), dt.double(), A.double()
    B, C = _per_head(B.double(), num_heads), _per_head(C.double(), num_heads)
    state = x.new_zeros(x.shape[0], num_heads, x.shape[3], B.shape[3])  # b k e s
    outputs = []
    for i in range(x.shape[1]):
        decay = torch.exp(dt[:, i] * A)[:, :, None, None]
        drive = torch.einsum("bke,bks->bkes", dt[:, i, :, None] * x[:, i], B[:, i])
        state = decay * state + drive
        outputs.append(torch.einsum("bkes,bks->bke", state, C[:, i]))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.double()[:, None] * x
    return y.to(dtype)


def ssd_dual(x: X, dt: DT, A: A_, B: BC, C: BC, D: A_ | None = None) -> X:
    """The masked matrix product, exact; memory and time grow with the square of length. See :func:`ssd`."""
    dt, A = at_least_float32(dt), at_least_float32(A)
    decay = _decay_mask(rearrange(dt * A, "b l k -> b k l"))  # b k l l
    scores = torch.einsum("blgs,bmgs->bglm", C, B)  # b g l l
    mixing = rearrange(decay, "b (g r) l m -> b g r l m", g=B.shape[2]) * scores[:, :, None]
    mixing = rearrange(mixing, "b g r l m -> b (g r) l m")
    mixing = (mixing * rearrange(dt, "b m k -> b k 1 m")).to(x.dtype)
    y = torch.einsum("bklm,bmke->blke", mixing, x)
    return y if D is None else y + D.to(x.dtype)[:, None] * x


def ssd_chunked(x: X, dt: DT, A: A_, B: BC, C: BC, D: A_ | None = None, *, chunk_size: int = CHUNK_SIZE) -> X:
    """Dual form inside chunks, state carried between them: any length, linear cost. See :func:`ssd`."""
    length, num_heads = x.shape[1], x.shape[2]
    if length <= chunk_size:  # one chunk, nothing to carry
        return ssd_dual(x, dt, A, B, C, D)
    padding = -length % chunk_size
    if padding:  # steps of dt = 0 change no state and their outputs are cut off
        x, B, C = (torch.nn.functional.pad(v, (0, 0, 0, 0, 0, padding)) for v in (x, B, C))
        dt = torch.nn.functional.pad(dt, (0, 0, 0, padding))

    def chunks(v: Tensor) -> Tensor:
        return rearrange(v, "b (n q) ... -> b n q ...", q=chunk_size)

    def flat(v: Tensor) -> Tensor:
        return rearrange(v, "b (n q) ... -> (b n) q ...", q=chunk_size)

    xc, dtc, Bc, Cc = chunks(x), chunks(dt), chunks(B), chunks(C)
    inside = rearrange(ssd_dual(flat(x), flat(dt), A, flat(B), flat(C)), "(b n) ... -> b n ...", b=x.shape[0])

    log_decay = (at_least_float32(dtc) * at_least_float32(A)).cumsum(dim=2)  # b n q k
    to_end = (log_decay[:, :, -1:] - log_decay).exp() * dtc
    Bh, Ch = (repeat(v, "b n q g s -> b n q (g r) s", r=num_heads // v.shape[3]) for v in (Bc, Cc))
    added = torch.einsum("bnqk,bnqke,bnqks->bnkes", to_end.to(x.dtype), xc, Bh)
    chunk_decay = log_decay[:, :, -1].exp().to(x.dtype)  # b n k
    state, states = torch.zeros_like(added[:, 0]), []
    for n in range(added.shape[1]):
        states.append(state)
        state = chunk_decay[:, n, :, None, None] * state + added[:, n]
    before = torch.stack(states, dim=1)  # b n k e s: the state when each chunk starts
    carried = torch.einsum("bnqks,bnkes->bnqke", Ch, before) * log_decay.exp().to(x.dtype)[..., None]
    y = (inside + carried).flatten(1, 2)[:, :length]
    return y if D is None else y + D.to(x.dtype)[:, None] * x[:, :length]


@not_traced  # the kernels tune themselves when first called, which no compiler can trace
def ssd_mamba_ssm(x: X, dt: DT, A: A_, B: BC, C: BC, D: A_ | None = None) -> X:
    """The kernels of the package mamba-ssm; in float32 their matrix products round to tf32. See :func:`ssd`."""
    if x.device.type != "cuda":
        raise BackendError(f"back end mamba_ssm needs tensors on a CUDA device, got {x.device}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise BackendError(f"back end mamba_ssm takes float32, bfloat16 or float16, got {x.dtype}")
    scan = load_kernels("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    batch, length = x.shape[:2]
    chunk_size = next((size for size in KERNEL_CHUNK_SIZES if length <= size), KERNEL_CHUNK_SIZES[-1])
    at_once = max(1, MAX_KERNEL_CHUNKS // -(-length // chunk_size))
    dt, A, B, C = dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype)
    parts = [
        scan(x[part], dt[part], A, B[part], C[part], chunk_size=chunk_size, D=D)
        for part in (slice(start, start + at_once) for start in range(0, batch, at_once))
    ]
    y: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": ssd_reference,
    "dual": ssd_dual,
    "chunked": ssd_chunked,
    "mamba_ssm": ssd_mamba_ssm,
}


def ssd(x: X, dt: DT, A: A_, B: BC, C: BC, D: A_ | None = None, *, backend: str = "auto") -> X:
    """State-space dual operator over the second axis.

    Args:
        x: Inputs, one vector a head and step.
        dt: Step sizes, positive (after softplus and bias).
        A: Decay rate of each head, negative.
        B: Input projections; the heads divide evenly over the groups ``g``.
        C: Output projections.
        D: Skip weight of each head; None is none.
        backend: ``auto`` (the fastest that was measured, see :mod:`medsora.ops.backends`), ``reference``, ``dual``,
            ``chunked`` or ``mamba_ssm``.

    Returns:
        Outputs of the shape and dtype of ``x``.

    Raises:
        BackendError: No such back end, or it cannot run here.

    Source: Dao and Gu, arXiv 2405.21060 (state-space duality).
    """
    chosen = resolve_backend(
        backend, operator="ssd", length=x.shape[1], batch=x.shape[0], device=x.device, dtype=x.dtype
    )
    return BACKENDS[chosen](x, dt, A, B, C, D)
