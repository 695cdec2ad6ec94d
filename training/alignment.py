"""Flow alignment: the denoiser's tokens after spatial Mamba are drawn towards what a frozen network says of motion.

``raft``: one block's tokens, through a convolutional projector, towards RAFT's motion features, in the way of REPA (Yu
et al., arXiv 2410.06940); up to a step, since it may hold the denoiser back later (Wang et al., arXiv 2505.16792).

``paper``: MedSora's own (arXiv 2411.01647): flow drawn as colour, seen by an image network, one layer for each block;
1 - Pearson correlation, weighted by time, above a margin. The released code gives its networks values of the wrong
range and compares tokens of different places; this does neither (docs/decisions/0013-flow-alignment.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medsora.diffusion.ddpm import NUM_TRAINED_TIMES
from medsora.files import sha256_of
from medsora.geometry import latent_shape
from medsora.jsonconfig import to_json
from medsora.models.denoiser import Denoiser
from training.config import AlignmentConfig, TrainConfig, config_hash
from training.data.cached_flow import cached_flow
from training.data.clips import ClipSet
from training.errors import TrainingError
from training.flow import MOTION_CHANNELS, Raft, flow_to_colour, load_raft
from training.flow_targets import FlowTargets, MeasurePairs, load_or_measure, measure_windows
from training.image_features import ImageFeatures, load_dino, squeezenet_features
from training.prepare.cache import Cache
from training.squeezenet import load_squeezenet

__all__ = [
    "Alignment",
    "AlignmentFiles",
    "BlockTaps",
    "ColourAlignment",
    "MotionAlignment",
    "MotionProjector",
    "alignment_weight",
    "colour_features",
    "layers_of_blocks",
    "make_alignment",
    "motion_features",
    "patch_grid",
]

PAIRS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class AlignmentFiles:
    """Weights of the frozen networks."""

    raft: Path | None = None
    """RAFT-small, in the published layout."""
    dino: Path | None = None
    """The image network of the paper's variant, as TorchScript."""
    squeezenet: Path | None = None
    """Its stand-in."""


class Alignment(Protocol):
    """One kind of alignment."""

    targets: FlowTargets
    """What the training windows are drawn towards."""

    def modules(self) -> dict[str, nn.Module]:
        """Networks that are trained beside the denoiser for it."""

    def loss(
        self, indices: Int[Tensor, " b"], t: Float[Tensor, "b f"], is_noisy: Bool[Tensor, "b f"]
    ) -> Float[Tensor, ""]:
        """Loss of the denoiser's last training pass, mean over clips; frames that were given clean do not count.

        Args:
            indices: Which windows (of all, mirrored ones after the others) that pass was about.
        """

    def forget(self) -> None:
        """Let go of the last pass, whose loss is not asked for."""


def alignment_weight(config: AlignmentConfig, step: int) -> float:
    """Weight of the alignment loss at a step: all of it, and 0 from the stop on."""
    if config.kind == "none" or (config.stop_step is not None and step >= config.stop_step):
        return 0.0
    return config.weight


class BlockTaps:
    """Holds the tokens after spatial Mamba of some blocks during a training pass.

    Those are what a block's third norm takes in, so a hook on that norm sees them, and the network stays as it is.
    """

    def __init__(self, model: Denoiser, blocks: Sequence[int]) -> None:
        norms = [model.get_submodule(f"blocks.{number}.norm3") for number in range(len(model.blocks))]
        self._norms = [norms[number] for number in blocks]
        for norm in norms:
            # all have the hook, and it looks who is meant: compiled blocks share their graphs whatever their hooks
            # are, but not where an attribute differs that is read
            norm.__dict__["is_tapped"] = norm in self._norms
            norm.register_forward_pre_hook(_keep_tokens)

    def take(self) -> list[Float[Tensor, "b f h w d"]]:
        """The tokens of the last pass, block by block; they are let go of here."""
        tokens = [cast(Tensor, norm.tokens) for norm in self._norms]
        self.forget()
        return tokens

    def forget(self) -> None:
        for norm in self._norms:
            norm.__dict__.pop("tokens", None)


def _keep_tokens(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    if norm.training and norm.is_tapped:
        norm.tokens = inputs[0]  # on the module: a compiled block can do that


class MotionProjector(nn.Module):
    """From tokens to motion features: 3x3 and 1x1 convolutions over each frame.

    Convolutions rather than a perceptron for each token: motion is a matter of neighbours.
    """

    def __init__(self, hidden_size: int, channels: int, out_channels: int = MOTION_CHANNELS) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(hidden_size, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, out_channels, 1)

    def forward(self, tokens: Float[Tensor, "b f h w d"]) -> Float[Tensor, "b c f h w"]:
        x: Tensor = self.conv1(rearrange(tokens, "b f h w d -> (b f) d h w"))
        projected: Tensor = rearrange(self.conv2(F.silu(x)), "(b f) c h w -> b c f h w", b=len(tokens))
        return projected


class MotionAlignment:
    """``raft``: 1 - cosine between projected tokens and motion features, mean over places.

    Args:
        targets: Standardised features of the training windows, on the grid of the denoiser's patches.
    """

    def __init__(self, model: Denoiser, targets: FlowTargets, config: AlignmentConfig) -> None:
        self.targets, self._taps = targets, BlockTaps(model, [config.block])
        channels = targets.features.shape[1]
        self.projector = MotionProjector(model.config.hidden_size, config.projector_channels, channels)
        self.projector.to(targets.features.device)

    def modules(self) -> dict[str, nn.Module]:
        return {"projector": self.projector}

    def loss(
        self, indices: Int[Tensor, " b"], t: Float[Tensor, "b f"], is_noisy: Bool[Tensor, "b f"]
    ) -> Float[Tensor, ""]:
        (tokens,) = self._taps.take()
        projected = self.projector(tokens).float()
        apart = 1.0 - F.cosine_similarity(projected, self.targets.gather(indices), dim=1)  # (b f h w)
        return _mean_over_noisy(apart.mean(dim=(2, 3)), is_noisy).mean()

    def forget(self) -> None:
        self._taps.forget()


class ColourAlignment:
    """``paper``: 1 - Pearson correlation of every block's tokens with a layer's features, weighted by time, above a
    margin.

    The weight is 1 / (k + 1) at step k of 1000. The margin is taken off each clip, not off a batch's mean: the
    published runs have one clip a batch, and over many clips the mean would hardly ever reach the margin.
    """

    def __init__(self, model: Denoiser, targets: FlowTargets, config: AlignmentConfig) -> None:
        self.targets, self.margin = targets, config.margin
        self._depth = len(model.blocks)
        self._taps = BlockTaps(model, range(self._depth))

    def modules(self) -> dict[str, nn.Module]:
        return {}

    def loss(
        self, indices: Int[Tensor, " b"], t: Float[Tensor, "b f"], is_noisy: Bool[Tensor, "b f"]
    ) -> Float[Tensor, ""]:
        wanted = rearrange(self.targets.gather(indices), "b (k d) f h w -> k b f h w d", k=self._depth)
        apart = [
            1.0 - F.cosine_similarity(_centred(tokens.float()), _centred(target), dim=-1).mean(dim=(2, 3))
            for tokens, target in zip(self._taps.take(), wanted, strict=True)
        ]
        weighted = torch.stack(apart).mean(dim=0) / (t * NUM_TRAINED_TIMES + 1.0)
        return F.relu(_mean_over_noisy(weighted, is_noisy) - self.margin).mean()

    def forget(self) -> None:
        self._taps.forget()


def _centred(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    return x - x.mean(dim=-1, keepdim=True)


def _mean_over_noisy(of_frames: Float[Tensor, "b f"], is_noisy: Bool[Tensor, "b f"]) -> Float[Tensor, " b"]:
    return (of_frames * is_noisy).sum(dim=1) / is_noisy.sum(dim=1)


def motion_features(raft: Raft, grid: tuple[int, int]) -> MeasurePairs:
    """RAFT's recurrent state of a pair of frames, averaged over the pixels of each patch of the denoiser.

    Args:
        grid: Rows and columns of patches.
    """

    def measure(first: Float[Tensor, "n 3 h w"], second: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c gh gw"]:
        _, state = raft.flow_and_motion(first, second)
        return F.adaptive_avg_pool2d(state, grid)

    return measure


def layers_of_blocks(depth: int, num_layers: int) -> list[int]:
    """Which of an image network's layers each block is compared with: evenly spread, the same one for equal depths."""
    if depth <= num_layers:
        return [min(num_layers - 1, round(block * num_layers / depth)) for block in range(depth)]
    return [block * num_layers // depth for block in range(depth)]


def colour_features(
    raft: Raft, features: ImageFeatures, *, depth: int, hidden_size: int, grid: tuple[int, int]
) -> MeasurePairs:
    """What an image network sees in the flow of a pair of frames, drawn as colour: one target for each block.

    Vectors are normed over their channels, averaged over the pixels of each patch, and stretched to the denoiser's
    width as the released code does, without a learned projection.
    """

    def measure(first: Float[Tensor, "n 3 h w"], second: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k gh gw"]:
        found = features(flow_to_colour(raft(first, second)))
        chosen = []
        for layer in layers_of_blocks(depth, len(found)):
            vectors = rearrange(found[layer].float(), "n c h w -> n h w c")
            normed = F.layer_norm(vectors, vectors.shape[-1:])
            pooled = F.adaptive_avg_pool2d(rearrange(normed, "n h w c -> n c h w"), grid)
            lines = rearrange(pooled, "n c h w -> n (h w) c")
            stretched = F.interpolate(lines, size=hidden_size, mode="linear", align_corners=False)
            chosen.append(rearrange(stretched, "n (h w) d -> n d h w", h=grid[0]))
        return torch.cat(chosen, dim=1)

    return measure


def patch_grid(config: TrainConfig) -> tuple[int, int]:
    """Rows and columns of the denoiser's patches."""
    _, height, width = latent_shape(config.data.num_frames, config.data.height, config.data.width)
    patch = config.model.denoiser.patch_size
    return height // patch, width // patch


def make_alignment(
    config: TrainConfig,
    model: Denoiser,
    clips: ClipSet,
    *,
    files: AlignmentFiles,
    cache: Path,
    device: torch.device,
    prepared: Cache | None = None,
) -> Alignment | None:
    """The alignment that a run asks for, with its targets from ``cache`` or computed now.

    Args:
        clips: The training windows.
        cache: File for the targets, safetensors.
        prepared: Cache that the clips are from; features of motion that it has are not measured again.

    Raises:
        TrainingError: A network is needed whose file is not named, or whose file is unusable.
    """
    settings = config.alignment
    if settings.kind == "none":
        return None
    if files.raft is None:
        raise TrainingError(
            f"alignment.kind is {settings.kind}: name RAFT-small's weights with --raft, or set alignment.kind=none"
        )
    image_file = files.dino or files.squeezenet
    if settings.kind == "paper" and image_file is None:
        raise TrainingError(
            "alignment.kind is paper: name its image network with --dino (TorchScript), or a stand-in with --squeezenet"
        )
    grid = patch_grid(config)
    used = {"raft": files.raft} | ({"image": image_file} if settings.kind == "paper" else {})

    def measure() -> MeasurePairs:
        assert files.raft is not None  # checked above
        raft = load_raft(files.raft, device=device)
        if settings.kind == "raft":
            return motion_features(raft, grid)
        if files.dino is not None:
            features = load_dino(files.dino, device=device)
        else:
            assert files.squeezenet is not None  # checked above
            features = squeezenet_features(load_squeezenet(files.squeezenet, device=device))
        return colour_features(
            raft, features, depth=model.config.depth, hidden_size=model.config.hidden_size, grid=grid
        )

    shape = {"depth": model.config.depth, "hidden_size": model.config.hidden_size} if settings.kind == "paper" else {}
    key = config_hash({
        "kind": settings.kind, "grid": grid, **shape, "data": to_json(config.data),
        "networks": {name: sha256_of(path) for name, path in used.items() if path is not None},
        "clips": [to_json(record) for record in clips.records],
    })  # fmt: skip

    def make() -> FlowTargets:
        if prepared is not None and settings.kind == "raft":
            assert files.raft is not None  # checked above
            stored = cached_flow(
                prepared, clips, network_sha256=sha256_of(files.raft), grid=grid, data=config.data,
                batch_size=PAIRS_AT_ONCE,
            )  # fmt: skip
            if stored is not None:
                return stored
        return measure_windows(
            clips,
            measure(),
            has_flips=config.data.has_flips,
            is_standardised=settings.kind == "raft",
            batch_size=PAIRS_AT_ONCE,
        )

    targets = load_or_measure(cache, key=key, device=device, make=make)
    if settings.kind == "raft":
        return MotionAlignment(model, targets, settings)
    return ColourAlignment(model, targets, settings)
