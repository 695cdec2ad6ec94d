"""Weights of the authors' released code (github.com/wongzbb/MedSora) as checkpoints of ours, exact to the bit.

Every tensor keeps its values; some change their shape or the order of their rows, and what the released code computes
otherwise than ours is an option of :class:`DenoiserConfig`. Only the denoiser: the released one works in the latent
space of another autoencoder. The facts are from reading that code; nothing is copied from it, which has no licence.

Files are read with ``weights_only``: tensors, plain containers, and the ``argparse.Namespace`` in which the released
training script keeps its arguments. Whatever else a pickle names is refused, and never run.
"""

import argparse
import math
import re
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from medsora.checkpoint import MAX_WEIGHT_BYTES, load_checkpoint, save_checkpoint
from medsora.config import DenoiserConfig, ModelConfig
from medsora.errors import CheckpointError
from medsora.files import sha256_of
from medsora.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE
from medsora.manifest import FORMAT_VERSION, Label, Limits, Manifest, find_checkpoint
from medsora.models.denoiser import TIME_FEATURES, sinusoids

__all__ = ["WEIGHTS", "convert_weights", "import_released", "read_released"]

WEIGHTS = ("ema", "model")
"""The moving average of the weights, which the released sampler uses, and the weights themselves."""
LATENT_FRAMES = 6
"""The released network has its scan orders for this many frames alone."""
LOCAL_WINDOW = 8
# The released moving average goes over the fixed positions too. In float32 its decay 0.9999 and the 0.0001 beside it
# do not add up to 1, which pulls an average towards 0.99983 of the value: 1.7e-4 off at most (docs/released.md).
POSITION_TOLERANCE = 2e-4


def read_released(path: Path, weights: str = "ema") -> dict[str, Tensor]:
    """The state dict of a checkpoint file that the released training script wrote.

    Args:
        weights: ``ema`` or ``model``, of the two that the file holds.

    Returns:
        Tensors by name, on the CPU, backed by the file. Names and values are yet to be checked.

    Raises:
        CheckpointError: No such file, too large, no zip archive of ``torch.save``, anything but weights inside, or
            other entries than expected.
    """
    if weights not in WEIGHTS:
        raise CheckpointError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if not path.is_file():
        raise CheckpointError(f"{path} is no regular file")
    size_bytes = path.stat().st_size
    if size_bytes > MAX_WEIGHT_BYTES:
        raise CheckpointError(f"{path} has more than the {MAX_WEIGHT_BYTES} bytes allowed")
    try:
        # mapped: a checkpoint holds optimizer states twice the size of the weights, which are never looked at
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive raises whatever its bytes lead to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read as weights alone: {reason}") from error
    if not isinstance(content, dict) or not isinstance(content.get(weights), dict):
        entries = ", ".join(sorted(map(str, content))) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} has no state dict {weights!r}; it holds: {entries[:200]}")
    state = content[weights]
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {str(name)[:80]!r} of {weights!r} is no named tensor")
        if value.dtype != torch.float32 or value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(f"{path}: tensor {name[:80]} is {value.dtype}, {value.layout}; it must be float32")
    # a few bytes can stand for a tensor of any size, by steps of 0 between its values
    if sum(value.nbytes for value in state.values()) > size_bytes:
        raise CheckpointError(f"{path}: its tensors have more values than the file holds")
    if state and all(name.startswith("module.") for name in state):  # saved from within DistributedDataParallel
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def convert_weights(released: Mapping[str, Tensor]) -> tuple[DenoiserConfig, dict[str, Tensor]]:
    """The shape and the state dict of our :class:`Denoiser` that computes what the released network does.

    Any of the released family (MedSora-S, B, L, XL): depth, widths and grid are those of the tensors.

    Args:
        released: Its state dict, float32.

    Raises:
        CheckpointError: Tensors are missing, unknown, of a wrong shape or not finite, or the fixed ones among them
            (position embedding, rotary frequencies) are not what the released code makes.
    """
    config = _config_of(released)
    layout = _layout(config)
    for problem, names in (("lacks", set(layout) - set(released)), ("has unknown", set(released) - set(layout))):
        if names:
            shown = ", ".join(name[:80] for name in sorted(names)[:5])
            raise CheckpointError(f"the state dict {problem} tensors, first of {len(names)}: {shown}")
    converted = {}
    for name, (target, shape) in layout.items():
        value = released[name].detach()
        if value.shape != shape:
            raise CheckpointError(f"tensor {name} has shape {tuple(value.shape)}, not {shape}")
        if not torch.isfinite(value).all():
            raise CheckpointError(f"tensor {name} holds values that are not finite")
        if target is not None:
            converted[target] = _reshaped(target, value, config).clone(memory_format=torch.contiguous_format)
    _check_fixed(released, config)
    return config, converted


def _config_of(released: Mapping[str, Tensor]) -> DenoiserConfig:
    hidden_size, in_channels, patch_size, _ = _shape(released, "x_embedder.proj.weight", 4)
    _, tokens, _ = _shape(released, "pos_embed", 3)
    (d_inner,) = _shape(released, "blocks.0.mamba_f.norm.weight", 1)
    (num_heads,) = _shape(released, "blocks.0.mamba_f.A_log", 1)
    d_conv_in, _, d_conv = _shape(released, "blocks.0.mamba_f.conv1d.weight", 3)
    blocks = {found[1] for name in released if (found := re.match(r"blocks\.(\d+)\.", name))}
    side = math.isqrt(tokens)
    try:
        # inexact quotients show as a tensor of another shape than they lead to
        return DenoiserConfig(
            in_channels=in_channels,
            out_channels=2 * in_channels,
            prediction="noise",
            patch_size=patch_size,
            hidden_size=hidden_size,
            depth=len(blocks),
            local_window=LOCAL_WINDOW,
            d_state=(d_conv_in - d_inner) // 2,
            d_conv=d_conv,
            expand=d_inner // hidden_size,
            headdim=d_inner // num_heads,
            scan_order="released",
            local_positions="released",
            position_grid=(side, side),
        )
    except ValueError as error:
        raise CheckpointError(f"the tensors are of no released network: {error}") from error


def _shape(released: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in released:
        raise CheckpointError(f"the state dict lacks tensors, among them {name}")
    shape = tuple(released[name].shape)
    if len(shape) != dimensions or min(shape) < 1:
        raise CheckpointError(f"tensor {name} has shape {shape}, not {dimensions} sizes from 1 on")
    return shape


def _layout(config: DenoiserConfig) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """Every tensor of the released network: its name there -> name here (None: not stored), shape there."""
    assert config.position_grid is not None
    d, patch = config.hidden_size, config.patch_size
    rows, columns = config.position_grid
    layout: dict[str, tuple[str | None, tuple[int, ...]]] = {
        "pos_embed": ("positions", (1, rows * columns, d)),
        "x_embedder.proj.weight": ("patch_in.weight", (d, config.in_channels, patch, patch)),
        "x_embedder.proj.bias": ("patch_in.bias", (d,)),
        "t_embedder.mlp.0.weight": ("time_in.weight", (d, TIME_FEATURES)),
        "t_embedder.mlp.0.bias": ("time_in.bias", (d,)),
        "t_embedder.mlp.2.weight": ("time_out.weight", (d, d)),
        "t_embedder.mlp.2.bias": ("time_out.bias", (d,)),
        "final_layer.linear.weight": ("patch_out.weight", (patch * patch * config.out_channels, d)),
        "final_layer.linear.bias": ("patch_out.bias", (patch * patch * config.out_channels,)),
        "final_layer.adaLN_modulation.1.weight": ("modulation_out.up.weight", (2 * d, d)),
        "final_layer.adaLN_modulation.1.bias": ("modulation_out.up.bias", (2 * d,)),
    }
    for index in range(config.depth):
        layout |= {
            f"blocks.{index}.{theirs}": (None if ours is None else f"blocks.{index}.{ours}", shape)
            for theirs, (ours, shape) in _block_layout(config).items()
        }
    return layout


def _block_layout(config: DenoiserConfig) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    d, d_inner, heads = config.hidden_size, config.d_inner, config.num_heads
    d_conv_in = d_inner + 2 * config.d_state
    block: dict[str, tuple[str | None, tuple[int, ...]]] = {
        "adaLN_modulation.1.weight": ("modulation.up.weight", (9 * d, d)),
        "adaLN_modulation.1.bias": ("modulation.up.bias", (9 * d,)),
        "query_matrix.weight": ("attention.query.weight", (d, d)),
        "key_matrix.weight": ("attention.key.weight", (d, d)),
        "value_matrix.weight": ("attention.value.weight", (d, d)),
        "local_attention.rel_pos.inv_freq": (None, (d // 2,)),
        # of the frame x width plane and of the frame x height plane
        "mamba_hw.gated_fusion.gate_F1.weight": ("spatial.gate_width.weight", (d, d)),
        "mamba_hw.gated_fusion.gate_F1.bias": ("spatial.gate_width.bias", (d,)),
        "mamba_hw.gated_fusion.gate_F2.weight": ("spatial.gate_height.weight", (d, d)),
        "mamba_hw.gated_fusion.gate_F2.bias": ("spatial.gate_height.bias", (d,)),
    }
    for norm in ("norm1", "norm2", "norm3"):
        block |= {f"{norm}.{part}": (f"{norm}.{part}", (d,)) for part in ("weight", "bias")}
    for theirs, ours in (("mamba_hw", "spatial.mamba"), ("mamba_f", "temporal.mamba")):
        block |= {
            f"{theirs}.in_proj.weight": (f"{ours}.in_proj.weight", (d_inner + d_conv_in + heads, d)),
            f"{theirs}.conv1d.weight": (f"{ours}.conv_weight", (d_conv_in, 1, config.d_conv)),
            f"{theirs}.conv1d.bias": (f"{ours}.conv_bias", (d_conv_in,)),
            f"{theirs}.dt_bias": (f"{ours}.dt_bias", (heads,)),
            f"{theirs}.A_log": (f"{ours}.A_log", (heads,)),
            f"{theirs}.D": (f"{ours}.D", (heads,)),
            f"{theirs}.norm.weight": (f"{ours}.norm_gain", (d_inner,)),
            f"{theirs}.out_proj.weight": (f"{ours}.out_proj.weight", (d, d_inner)),
        }
    return block


def _reshaped(target: str, value: Tensor, config: DenoiserConfig) -> Tensor:
    """A tensor of the released layout in the layout of ours of that name."""
    patch = config.patch_size
    if target == "positions":
        assert config.position_grid is not None
        return rearrange(value, "1 (h w) d -> h w d", h=config.position_grid[0])
    if target == "patch_in.weight":
        return rearrange(value, "d c p q -> d (c p q)")
    if target in ("patch_out.weight", "patch_out.bias"):
        return rearrange(value, "(p q c) ... -> (c p q) ...", p=patch, q=patch)
    if target.endswith(".conv_weight"):
        return rearrange(value, "c 1 k -> c k")
    return value


def _check_fixed(released: Mapping[str, Tensor], config: DenoiserConfig) -> None:
    """Refuse where what training does not change is not what the released code makes."""
    assert config.position_grid is not None
    positions = _positions(config.position_grid[0], config.hidden_size)
    away = (released["pos_embed"][0].double() - positions).abs().max().item()
    if away > POSITION_TOLERANCE:
        raise CheckpointError(
            f"tensor pos_embed is no 2-D sine-cosine embedding: {away:.2g} away, {POSITION_TOLERANCE} allowed"
        )
    size = config.hidden_size
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    for index in range(config.depth):
        name = f"blocks.{index}.local_attention.rel_pos.inv_freq"
        # float32 powers differ by some units in the last place between devices
        if not torch.allclose(released[name].double(), frequencies, rtol=1e-6, atol=0):
            raise CheckpointError(f"tensor {name} has other rotary frequencies than 10000^(-2i/{size})")


def _positions(side: int, size: int) -> Tensor:
    """The released position embedding (tokens, size): half the channels for the column, half for the row; float64."""
    cosines, sines = sinusoids(torch.arange(side, dtype=torch.float64), size // 2).chunk(2, dim=-1)
    line = torch.cat([sines, cosines], dim=-1)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, dim=0)], dim=-1)


def import_released(
    path: str | Path,
    directory: str | Path,
    *,
    weights: str = "ema",
    autoencoder: str | Path | None = None,
    name: str = "medsora-released",
    label: str = "unconditional",
    fps: float = 6.0,
) -> Manifest:
    """Write a checkpoint directory of ours from a checkpoint file of the released code; it appears whole or not at all.

    Args:
        directory: Must not exist.
        weights: ``ema`` or ``model``.
        autoencoder: A checkpoint whose autoencoder to take. Its latent space must be the one that the denoiser was
            trained in, which nothing here can check. None makes a checkpoint of the denoiser alone.
        name: Of the checkpoint.
        label: Name of the one thing that can be asked for.
        fps: Frames a second of the training windows; the released code writes 6.

    Returns:
        The manifest as written.

    Raises:
        CheckpointError: The file is refused, the directory exists, or the autoencoder does not fit.
    """
    source, target = Path(path), Path(directory)
    if target.exists():
        raise CheckpointError(f"{target} exists already; give a new directory")
    denoiser_config, denoiser = convert_weights(read_released(source, weights))
    coder = None if autoencoder is None else load_checkpoint(find_checkpoint(autoencoder)).autoencoder
    if autoencoder is not None and coder is None:
        raise CheckpointError(f"{autoencoder} has no autoencoder")
    try:
        config = ModelConfig(
            autoencoder=None if coder is None else coder.config, denoiser=denoiser_config, condition_names={}
        )
        manifest = _manifest(source, denoiser_config, weights=weights, name=name, label=label, fps=fps)
    except ValueError as error:
        raise CheckpointError(f"{source} cannot be imported so: {error}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        written = save_checkpoint(
            scratch,
            config=config,
            autoencoder=None if coder is None else coder.state_dict(),
            denoiser=denoiser,
            manifest=manifest,
            dtype="float32",
        )
        loaded = load_checkpoint(scratch).denoiser.state_dict()
        if any(not torch.equal(value, denoiser[key]) for key, value in loaded.items()):
            raise CheckpointError(f"{scratch}: a weight is not the same after saving and loading")
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return written


def _manifest(source: Path, config: DenoiserConfig, *, weights: str, name: str, label: str, fps: float) -> Manifest:
    assert config.position_grid is not None
    rows, columns = config.position_grid
    pixels = SPATIAL_STRIDE * config.patch_size
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        description=f"MedSora denoiser from a checkpoint of the authors' released code ({weights} weights).",
        modality="ES",
        intended_use="Research only. Not for diagnosis or any other clinical use.",
        licence="Unknown: the released code states none for its weights.",
        created_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        labels=(Label(name=label, description="Whatever the denoiser was trained on.", condition={}),),
        limits=Limits(
            sizes=((columns * pixels, rows * pixels),),
            num_frames=(LATENT_FRAMES * TEMPORAL_STRIDE,),
            fps=fps,
            num_inference_steps=(2, 250, 1000),
            guidance_scale=(1.0, 1.0, 1.0),
            samplers=("ddim", "ddpm"),
        ),
        training={"imported_from": {"sha256": sha256_of(source), "weights": weights}},
    )
