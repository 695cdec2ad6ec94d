"""The three mixers of a MedSora block: local attention, spatial Mamba and temporal Mamba.

Source: MedSora (arXiv 2411.01647) and its released code, re-derived; decisions where the two differ are in
docs/decisions. Axis letters: b batch, f frames, h height, w width, n tokens, d hidden, p projected channels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from medsora.config import DenoiserConfig
from medsora.models.scans import NUM_SPIRALS, inverse_order, spiral_order
from medsora.ops import MixerWeights, Walks, mix

__all__ = ["LocalAttention", "Mamba2", "SpatialMamba", "TemporalMamba"]


def rotations(
    length: int, half: int, *, first_position: int, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]]:
    """Cosines and sines that turn the pairs of channels at each position (Su et al., arXiv 2104.09864)."""
    precise = torch.promote_types(dtype, torch.float32)  # angles bear no less
    frequency = 10000.0 ** (-torch.arange(half, device=device, dtype=precise) / half)
    angle = torch.arange(first_position, first_position + length, device=device, dtype=precise)[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Float[Tensor, "... n d"], turns: tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]]) -> Tensor:
    """Rotary position embedding over the last two axes, halves paired, by :func:`rotations`."""
    cos, sin = turns
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class LocalAttention(nn.Module):
    """One head of attention per frame; a token sees raster neighbours at most ``window`` away.

    With window 8 on an 8 x 8 grid that is the row before, its own and the row after. Rotary positions, no
    output projection, as in MedSora.

    Args:
        positions: ``relative``, or ``released``: the released code turns a query as if it stood one window later
            (it counts keys within a window and its two neighbours, but queries within the last of the three).
    """

    def __init__(self, hidden_size: int, window: int, *, positions: str = "relative") -> None:
        super().__init__()
        self.window = window
        self.query_shift = window if positions == "released" else 0
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self._turns: dict[tuple[int, torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        position = torch.arange(x.shape[1], device=x.device)
        near = (position[:, None] - position).abs() <= self.window
        of_query, of_key = self.turns(x.shape[1], x.device, x.dtype)
        # one product for all three: more of a GPU's rate, and fewer launches
        together = F.linear(x, torch.cat([self.query.weight, self.key.weight, self.value.weight]))
        query, key, value = together.chunk(3, dim=-1)
        query, key = rotate(query, of_query), rotate(key, of_key)
        # the middle axis is the single head, which the fused kernels expect
        mixed = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], attn_mask=near)
        return mixed[:, 0]

    def turns(self, length: int, device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Rotations of queries and of keys, made once a length: powers and sines cost more than all else here."""
        key = (length, device, dtype)
        if key not in self._turns:
            half = self.query.out_features // 2
            with torch.inference_mode(False):  # tables made there could not be used in training later
                self._turns[key] = [
                    rotations(length, half, first_position=position, device=device, dtype=dtype)
                    for position in (self.query_shift, 0)
                ]
        return self._turns[key]


class Mamba2(nn.Module):
    """One set of Mamba-2 parameters, applied to any number of scans of the same tokens.

    ``project`` once, ``mix`` along any walks, ``merge`` once for each sum of walks
    (:mod:`medsora.ops.mixer` has what is between the projections).

    Source: Dao and Gu, arXiv 2405.21060, the Mamba-2 block (parallel projections, gated norm before the output).
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        d_inner, num_heads = config.d_inner, config.num_heads
        self.d_inner, self.d_state, self.headdim = d_inner, config.d_state, config.headdim
        d_conv_in = d_inner + 2 * config.d_state
        self.in_proj = nn.Linear(config.hidden_size, d_inner + d_conv_in + num_heads, bias=False)  # z, xBC, dt
        self.conv_weight = nn.Parameter(torch.empty(d_conv_in, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(d_conv_in))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.D = nn.Parameter(torch.ones(num_heads))
        self.norm_gain = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, config.hidden_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        bound = self.conv_weight.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        if self.A_log.is_meta:  # which has no values, and would load torch's compiler to compute them
            return
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
            # step sizes log-uniform in [0.001, 0.1]; dt_bias is their inverse softplus
            dt = torch.exp(torch.empty_like(self.dt_bias).uniform_(-6.9078, -2.3026)).clamp_min(1e-4)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def project(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... p"]:
        """Gate, convolution input and step size of every token, side by side."""
        projected: Tensor = self.in_proj(x)
        return projected

    def mix(self, projected: Float[Tensor, "b n p"], walks: Walks, *, backend: str) -> Float[Tensor, "b n i"]:
        """Scan the projected tokens of each clip along the walks, and sum. Not yet merged."""
        weights = MixerWeights(
            self.conv_weight, self.conv_bias, self.dt_bias, self.A_log, self.D, norm_gain=self.norm_gain
        )
        return mix(projected, walks, weights, backend=backend)

    def merge(self, scans: Float[Tensor, "... i"]) -> Float[Tensor, "... d"]:
        """Project the (summed) outputs of scans back to the hidden size."""
        merged: Tensor = self.out_proj(scans)
        return merged


class WalkTables:
    """Walks of a mixer by shape and device: indices go to the device once a shape, not once a step."""

    def __init__(self, make: Callable[[int, int, int], tuple[Walks, ...]]) -> None:
        self._make = make
        self._made: dict[tuple[int, int, int, torch.device], tuple[Walks, ...]] = {}

    def __call__(self, f: int, h: int, w: int, device: torch.device) -> tuple[Walks, ...]:
        key = (f, h, w, device)
        if key not in self._made:
            # a tensor made under inference_mode could not be used in training later
            with torch.inference_mode(False):
                self._made[key] = tuple(walks.to(device) for walks in self._make(f, h, w))
        return self._made[key]


class SpatialMamba(nn.Module):
    """Bidirectional spiral scans of the frame x width and frame x height planes, fused by gates.

    Each plane is one sequence per row (or column); block ``index`` uses spiral ``index mod 8``, walked both
    ways. All scans share one set of Mamba-2 weights.
    """

    def __init__(self, config: DenoiserConfig, index: int) -> None:
        super().__init__()
        self.spiral, self.scan_order = index % NUM_SPIRALS, config.scan_order
        self.mamba = Mamba2(config)
        self.gate_width = nn.Linear(config.hidden_size, config.hidden_size)
        self.gate_height = nn.Linear(config.hidden_size, config.hidden_size)
        self.walks = WalkTables(self._plane_walks)

    def forward(self, x: Float[Tensor, "b f h w d"], *, backend: str) -> Float[Tensor, "b f h w d"]:
        f, h, w = x.shape[1:4]
        tokens = self.mamba.project(x).flatten(1, 3)
        mixed = [self.mamba.mix(tokens, plane, backend=backend) for plane in self.walks(f, h, w, x.device)]
        over_width, over_height = self.mamba.merge(torch.stack(mixed)).unbind()
        fused: Tensor = (
            torch.sigmoid(self.gate_width(over_width)) * over_width
            + torch.sigmoid(self.gate_height(over_height)) * over_height
        )
        return fused.reshape(x.shape)

    def _plane_walks(self, f: int, h: int, w: int) -> tuple[Walks, Walks]:
        """Both directions of the spiral over frame x width, for each row, and over frame x height, for each column."""
        token = torch.arange(f * h * w, device="cpu").reshape(f, h, w)
        planes = (rearrange(token, "f h w -> h (f w)"), rearrange(token, "f h w -> w (f h)"))
        width, height = (
            Walks(torch.stack([plane[:, order] for order in self._orders(f, plane.shape[1] // f)])) for plane in planes
        )
        return width, height

    def _orders(self, rows: int, columns: int) -> tuple[list[int], list[int]]:
        spiral = spiral_order(rows, columns, self.spiral)
        orders = (spiral, spiral[::-1])
        if self.scan_order == "released":
            # the released code gathers with the ranks of its walks: other walks, which are not connected
            orders = (inverse_order(orders[0]), inverse_order(orders[1]))
        return list(orders[0]), list(orders[1])


class TemporalMamba(nn.Module):
    """Mamba-2 along the frames of each place; with two directions, the same weights also run backwards."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.directions = config.temporal_directions
        self.mamba = Mamba2(config)
        self.walks = WalkTables(self._frame_walks)

    def forward(self, x: Float[Tensor, "b f h w d"], *, backend: str) -> Float[Tensor, "b f h w d"]:
        f, h, w = x.shape[1:4]
        (walks,) = self.walks(f, h, w, x.device)
        mixed = self.mamba.mix(self.mamba.project(x).flatten(1, 3), walks, backend=backend)
        return self.mamba.merge(mixed).reshape(x.shape)

    def _frame_walks(self, f: int, h: int, w: int) -> tuple[Walks]:
        frames = rearrange(torch.arange(f * h * w, device="cpu"), "(f n) -> n f", f=f)
        return (Walks(torch.stack([frames, frames.flip(1)][: self.directions])),)
