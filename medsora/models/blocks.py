"""The three mixers of a MedSora block: local attention, spatial Mamba and temporal Mamba.

Source: MedSora (arXiv 2411.01647) and its released code, re-derived; decisions where the two differ are in
docs/decisions. Axis letters: b batch, f frames, h height, w width, n tokens, d hidden, p projected channels.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from medsora.config import DenoiserConfig
from medsora.models.scans import NUM_SPIRALS, inverse_order, spiral_order
from medsora.ops import at_least_float32, ssd

__all__ = ["LocalAttention", "Mamba2", "SpatialMamba", "TemporalMamba"]


def rotate(x: Float[Tensor, "... n d"], *, first_position: int = 0) -> Float[Tensor, "... n d"]:
    """Rotary position embedding over the last two axes, halves paired (Su et al., arXiv 2104.09864)."""
    length, half = x.shape[-2], x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)  # angles bear no less
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = torch.arange(first_position, first_position + length, device=x.device, dtype=dtype)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
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

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        position = torch.arange(x.shape[1], device=x.device)
        near = (position[:, None] - position).abs() <= self.window
        query, key = rotate(self.query(x), first_position=self.query_shift), rotate(self.key(x))
        value = self.value(x)
        # the middle axis is the single head, which the fused kernels expect
        mixed = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], attn_mask=near)
        return mixed[:, 0]


class Mamba2(nn.Module):
    """One set of Mamba-2 parameters, applied to any number of scans of the same tokens.

    ``project`` once, ``scan`` each order, put the scans' outputs back in place and sum them, ``merge`` once:
    the output projection has no bias, so summing before it is exact and saves a product a scan.

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
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
            # step sizes log-uniform in [0.001, 0.1]; dt_bias is their inverse softplus
            dt = torch.exp(torch.empty_like(self.dt_bias).uniform_(-6.9078, -2.3026)).clamp_min(1e-4)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def project(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... p"]:
        """Gate, convolution input and step size of every token, side by side."""
        projected: Tensor = self.in_proj(x)
        return projected

    def scan(self, projected: Float[Tensor, "b l p"], *, backend: str) -> Float[Tensor, "b l i"]:
        """Scan a sequence of projected tokens: causal convolution, SSD, gated norm. Not yet merged."""
        d_conv_in = self.d_inner + 2 * self.d_state
        z, conv_in, dt = torch.split(projected, [self.d_inner, d_conv_in, self.A_log.shape[0]], dim=-1)
        mixed = F.silu(self._causal_convolution(conv_in))
        x, B, C = torch.split(mixed, [self.d_inner, self.d_state, self.d_state], dim=-1)
        y = ssd(
            rearrange(x, "b l (k e) -> b l k e", e=self.headdim),
            F.softplus(at_least_float32(dt) + at_least_float32(self.dt_bias)),
            -torch.exp(at_least_float32(self.A_log)),
            rearrange(B, "b l s -> b l 1 s"),
            rearrange(C, "b l s -> b l 1 s"),
            self.D,
            backend=backend,
        )
        gated = y.flatten(2) * F.silu(z)
        scale = at_least_float32(gated).square().mean(dim=-1, keepdim=True).add(1e-5).rsqrt()
        return gated * scale.to(gated.dtype) * self.norm_gain.to(gated.dtype)

    def merge(self, scans: Float[Tensor, "... i"]) -> Float[Tensor, "... d"]:
        """Project the (summed) outputs of scans back to the hidden size."""
        merged: Tensor = self.out_proj(scans)
        return merged

    def _causal_convolution(self, x: Tensor) -> Tensor:  # (b l c), depthwise over l
        taps = self.conv_weight.shape[1]
        padded = F.pad(x, (0, 0, taps - 1, 0))
        weight = self.conv_weight.to(x.dtype)
        # sum of shifted products: no transposes, and a compiler fuses it with what is around
        shifted = (padded[:, k : k + x.shape[1]] * weight[:, k] for k in range(taps))
        return self.conv_bias.to(x.dtype) + sum(shifted)


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
        self._orders: dict[tuple[int, int, torch.device], tuple[tuple[Tensor, Tensor], ...]] = {}

    def forward(self, x: Float[Tensor, "b f h w d"], *, backend: str) -> Float[Tensor, "b f h w d"]:
        b, f, h, w, _ = x.shape
        projected = self.mamba.project(x)
        rows = rearrange(projected, "b f h w p -> (b h) (f w) p")
        columns = rearrange(projected, "b f h w p -> (b w) (f h) p")
        over_width = rearrange(self._scan_plane(rows, f, w, backend), "(b h) (f w) d -> b f h w d", b=b, f=f)
        over_height = rearrange(self._scan_plane(columns, f, h, backend), "(b w) (f h) d -> b f h w d", b=b, f=f)
        return (
            torch.sigmoid(self.gate_width(over_width)) * over_width
            + torch.sigmoid(self.gate_height(over_height)) * over_height
        )

    def _scan_plane(self, tokens: Tensor, rows: int, columns: int, backend: str) -> Tensor:
        (there, back), (other_there, other_back) = self._walks(rows, columns, tokens.device)
        both = self.mamba.scan(torch.cat([tokens[:, there], tokens[:, other_there]]), backend=backend)
        forward, backward = both.chunk(2)
        return self.mamba.merge(forward[:, back] + backward[:, other_back])

    def _walks(self, rows: int, columns: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
        """Both directions of the spiral, each as the order of the walk and the way back into place."""
        key = (rows, columns, device)
        if key not in self._orders:  # indices go to the device once a shape, not once a step
            spiral = spiral_order(rows, columns, self.spiral)
            orders = (spiral, spiral[::-1])
            if self.scan_order == "released":
                # the released code gathers with the ranks of its walks: other walks, which are not connected
                orders = (inverse_order(orders[0]), inverse_order(orders[1]))
            # a tensor made under inference_mode could not be used in training later
            with torch.inference_mode(False):
                self._orders[key] = tuple(
                    (torch.tensor(order, device=device), torch.tensor(inverse_order(order), device=device))
                    for order in orders
                )
        return self._orders[key]


class TemporalMamba(nn.Module):
    """Mamba-2 along the frames of each place; with two directions, the same weights also run backwards."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.directions = config.temporal_directions
        self.mamba = Mamba2(config)

    def forward(self, x: Float[Tensor, "b f h w d"], *, backend: str) -> Float[Tensor, "b f h w d"]:
        b, _, h, w, _ = x.shape
        tokens = self.mamba.project(rearrange(x, "b f h w d -> (b h w) f d"))
        if self.directions == 2:
            both = self.mamba.scan(torch.cat([tokens, tokens.flip(1)]), backend=backend)
            forward, backward = both.chunk(2)
            scanned = forward + backward.flip(1)
        else:
            scanned = self.mamba.scan(tokens, backend=backend)
        return rearrange(self.mamba.merge(scanned), "(b h w) f d -> b f h w d", b=b, h=h, w=w)
