"""The MedSora denoiser, top to bottom: latents at time t and a condition -> velocity, or noise with its variance.

Source: MedSora (arXiv 2411.01647) and its released code. What is ours: time is given per latent
frame, so that frames already known can be held clean (t = 0), and class conditions.
Axis letters: b batch, c channels, f frames, h height, w width (of latents, or of patches), d hidden.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from medsora.config import DenoiserConfig
from medsora.models.blocks import LocalAttention, SpatialMamba, TemporalMamba
from medsora.ops import at_least_float32

__all__ = ["Denoiser"]

TIME_FEATURES = 256
TIME_SCALE = 1000.0
"""Times in [0, 1] are spread to [0, 1000] before their sinusoids, the range these were made for."""


def sinusoids(position: Float[Tensor, "*n"], size: int) -> Float[Tensor, "*n {size}"]:
    """Cosines and sines of a position at ``size / 2`` frequencies from 1 down to about 1e-4, in float32 at least."""
    position = at_least_float32(position)
    index = torch.arange(size // 2, device=position.device, dtype=position.dtype)
    angle = position[..., None] * torch.exp(-math.log(10000.0) * index / (size // 2))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def grid_positions(like: Float[Tensor, "b f h w d"]) -> Float[Tensor, "h w d"]:
    """Fixed 2-D sine-cosine position embedding: half of the channels for the row, half for the column."""
    height, width, size = like.shape[2:]
    dtype = torch.promote_types(like.dtype, torch.float32)
    rows = sinusoids(torch.arange(height, device=like.device, dtype=dtype), size // 2)
    columns = sinusoids(torch.arange(width, device=like.device, dtype=dtype), size // 2)
    positions = torch.cat(
        [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)],
        dim=-1,
    )
    return positions.to(like.dtype)


class Modulation(nn.Module):
    """adaLN-Zero: shifts, scales and gates from the condition of each frame.

    A rank makes the projection two thin matrices instead of the paper's full one.
    """

    def __init__(self, hidden_size: int, outputs: int, rank: int | None) -> None:
        super().__init__()
        self.outputs = outputs
        self.down = None if rank is None else nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(hidden_size if rank is None else rank, outputs * hidden_size)

    def forward(self, embedding: Float[Tensor, "b f d"]) -> tuple[Tensor, ...]:  # each b f 1 1 d
        x = F.silu(embedding)
        rows: Tensor = self.up(x if self.down is None else self.down(x))
        return rows[:, :, None, None].chunk(self.outputs, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Local attention, spatial Mamba, temporal Mamba, each normed, modulated and gated. No MLP."""

    def __init__(self, config: DenoiserConfig, index: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.modulation = Modulation(size, 9, config.modulation_rank)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(size), nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = LocalAttention(size, config.local_window, positions=config.local_positions)
        self.spatial = SpatialMamba(config, index)
        self.temporal = TemporalMamba(config)

    def forward(
        self, x: Float[Tensor, "b f h w d"], embedding: Float[Tensor, "b f d"], backend: str
    ) -> Float[Tensor, "b f h w d"]:
        f, h = x.shape[1:3]
        modulation: tuple[Tensor, ...] = self.modulation(embedding)
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = modulation
        tokens = rearrange(modulate(self.norm1(x), shift1, scale1), "b f h w d -> (b f) (h w) d")
        local: Tensor = rearrange(self.attention(tokens), "(b f) (h w) d -> b f h w d", f=f, h=h)
        x = x + gate1 * local
        spatial: Tensor = self.spatial(modulate(self.norm2(x), shift2, scale2), backend=backend)
        x = x + gate2 * spatial
        temporal: Tensor = self.temporal(modulate(self.norm3(x), shift3, scale3), backend=backend)
        return x + gate3 * temporal


class Denoiser(nn.Module):
    """The whole network. ``backend`` names the mixers' back end (see :mod:`medsora.ops.mixer`)."""

    positions: Tensor | None

    def __init__(self, config: DenoiserConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config, self.backend = config, backend
        size, patch = config.hidden_size, config.patch_size
        self.patch_in = nn.Linear(config.in_channels * patch**2, size)
        # the moving average of released weights went over the fixed positions too, and changed them slightly
        grid = config.position_grid
        self.register_buffer("positions", None if grid is None else grid_positions(torch.empty(1, 1, *grid, size)))
        self.time_in, self.time_out = nn.Linear(TIME_FEATURES, size), nn.Linear(size, size)
        self.step_in: nn.Linear | None = None
        self.step_out: nn.Linear | None = None
        if config.has_step_sizes:
            self.step_in, self.step_out = nn.Linear(TIME_FEATURES, size), nn.Linear(size, size)
        self.conditions = nn.ModuleList(nn.Embedding(classes + 1, size) for classes in config.condition_sizes)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm_out = nn.LayerNorm(size, eps=1e-6, elementwise_affine=False)
        self.modulation_out = Modulation(size, 2, config.modulation_rank)
        self.patch_out = nn.Linear(size, config.out_channels * patch**2)
        self._initialise()

    def _positions_of(self, x: Float[Tensor, "b f h w d"]) -> Float[Tensor, "h w d"]:
        stored = self.positions
        if stored is None:
            return grid_positions(x)
        if stored.shape != x.shape[2:]:
            raise ValueError(
                f"latents must have {stored.shape[0]} x {stored.shape[1]} patches, whose positions are stored; "
                f"got {x.shape[2]} x {x.shape[3]}"
            )
        return stored

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.time_in.weight, std=0.02)
        nn.init.normal_(self.time_out.weight, std=0.02)
        if self.step_out is not None:
            nn.init.zeros_(self.step_out.weight)  # at first all steps are short ones
        # adaLN-Zero: at first every block is the identity and the velocity is zero
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.up.weight)
        nn.init.zeros_(self.patch_out.weight)

    def forward(
        self,
        latents: Float[Tensor, "b c f h w"],
        t: Float[Tensor, "b f"],
        condition: Int[Tensor, "b k"],
        step: Float[Tensor, "b f"] | None = None,
    ) -> Float[Tensor, "b o f h w"]:
        """Predict the velocity (noise - data) of every latent frame, or its noise and then the noise's variance.

        Args:
            latents: Noisy latents; height and width multiples of the patch size.
            t: Diffusion time of each frame, 0 (clean) to 1 (noise). Of a network that predicts noise, the trained
                step over 1000; one between two steps counts as the nearest.
            condition: Class of each condition; ``config.null_condition`` asks for none.
            step: Of a network that has step sizes: how far the sampler goes from ``t`` towards 0 at once, above 0. The
                answer is then the mean velocity over that way, with the guidance that it was trained with. None asks
                for the velocity at ``t``.
        """
        x, embedding = self._embed(latents, t, condition, step)
        for block in self.blocks:
            x = block(x, embedding, self.backend)
        return self._head(x, embedding)

    def _embed(
        self, latents: Tensor, t: Tensor, condition: Tensor, step: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens of all patches (b f h w d), and what modulates each frame (b f d)."""
        patch = self.config.patch_size
        x: Tensor = self.patch_in(rearrange(latents, "b c f (h p) (w q) -> b f h w (c p q)", p=patch, q=patch))
        x = x + self._positions_of(x)
        time = t * TIME_SCALE
        if self.config.prediction == "noise":
            # defined at the steps 0 to 999 alone; 10 of them, over 1000 and times 1000 in float32, are no whole number
            time = time.round()
        features = sinusoids(time, TIME_FEATURES).to(x.dtype)
        embedding: Tensor = self.time_out(F.silu(self.time_in(features)))
        if step is not None:
            assert self.step_in is not None, "the network has no step sizes"
            assert self.step_out is not None
            features = sinusoids(step * TIME_SCALE, TIME_FEATURES).to(x.dtype)
            embedding = embedding + self.step_out(F.silu(self.step_in(features)))
        for index, table in enumerate(self.conditions):
            embedding = embedding + table(condition[:, index])[:, None]
        return x, embedding

    def _head(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Prediction (b o f h w) of the last tokens."""
        patch = self.config.patch_size
        shift, scale = self.modulation_out(embedding)
        x = self.patch_out(modulate(self.norm_out(x), shift, scale))
        return rearrange(x, "b f h w (c p q) -> b c f (h p) (w q)", p=patch, q=patch)

    def compile_parts(self) -> None:
        """Compile for inference on fixed shapes: ends and blocks apart, since all blocks then share one graph.

        Call :meth:`make_tables` for each shape before it runs: tables made while tracing would be constants of each
        block's own, and every block would compile anew (docs/experiments.md).
        """
        # intermediate results padded to round strides would be copied for the kernels of our own
        options: dict[str, str | int | bool | Callable[..., object]] = {"comprehensive_padding": False}
        self._embed = torch.compile(self._embed, dynamic=False, options=options)  # type: ignore[method-assign]
        self._head = torch.compile(self._head, dynamic=False, options=options)  # type: ignore[method-assign]
        for block in self.blocks:
            block.compile(dynamic=False, options=options)

    def make_tables(self, latent: tuple[int, int, int], device: torch.device) -> None:
        """Make what depends on shapes alone for latents of (frames, height, width), if it is not there yet."""
        f, h, w = latent[0], latent[1] // self.config.patch_size, latent[2] // self.config.patch_size
        dtype = self.patch_in.weight.dtype
        for module in self.modules():
            if isinstance(module, SpatialMamba | TemporalMamba):
                for walks in module.walks(f, h, w, device):
                    walks.tiles(self.config.d_conv - 1)
            elif isinstance(module, LocalAttention):
                module.turns(h * w, device, dtype)
