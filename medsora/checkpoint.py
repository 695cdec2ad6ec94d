"""Checkpoint directories: config.json, autoencoder.safetensors (may be left out), denoiser.safetensors, manifest.json.

Weights are data, never code: safetensors and JSON only. Before any tensor is made, a file's size and hash are
compared with the manifest and its header is bounded; after, keys and shapes must be the network's own, and
values finite. Files are read once and then checked in memory. In a new directory the manifest is written last, so
one that has a manifest is whole.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medsora.config import ModelConfig, config_from_json, config_to_json
from medsora.errors import CheckpointError
from medsora.files import parse_weight_header, read_bounded, sha256_of, sync, write_file
from medsora.fingerprints import FINGERPRINT_BYTES
from medsora.geometry import SPATIAL_STRIDE, is_valid_video_shape
from medsora.jsonconfig import to_json
from medsora.manifest import (
    CHECKED_FILES,
    FORMAT_VERSION,
    FileRecord,
    FingerprintRecord,
    Label,
    Limits,
    Manifest,
    parse_json,
    read_manifest,
)
from medsora.models.autoencoder import VideoAutoencoder
from medsora.models.denoiser import Denoiser
from medsora.presets import preset

__all__ = [
    "LoadedCheckpoint",
    "add_fingerprints",
    "load_checkpoint",
    "load_fingerprints",
    "save_checkpoint",
    "write_tiny_checkpoint",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_WEIGHT_BYTES = 16 * 2**30
FINGERPRINTS = "fingerprints.bin"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """Both networks in float32 on the CPU, in evaluation mode, with what the checkpoint says of itself."""

    config: ModelConfig
    manifest: Manifest
    autoencoder: VideoAutoencoder | None
    """None: the checkpoint is a denoiser alone, which makes latents and no video."""
    denoiser: Denoiser


def save_checkpoint(
    directory: str | Path,
    *,
    config: ModelConfig,
    autoencoder: Mapping[str, Tensor] | None,
    denoiser: Mapping[str, Tensor],
    manifest: Manifest,
    dtype: str = "float16",
) -> Manifest:
    """Write a checkpoint directory; each file appears whole or not at all, the manifest last.

    To replace a checkpoint that is in use, write to a new directory and rename that.

    Args:
        autoencoder: State dict of a :class:`VideoAutoencoder` of ``config.autoencoder``; None where that is None.
        denoiser: State dict of a :class:`Denoiser` of ``config.denoiser``.
        manifest: Its ``files`` are replaced by what was written.
        dtype: Of the stored floating-point weights, a torch name. float16 keeps 11 bits, bfloat16 only 8.

    Returns:
        The manifest as written.

    Raises:
        CheckpointError: Labels do not fit the configuration, a weight does not fit ``dtype``, or an autoencoder is
            configured and not given, or the other way round.
    """
    target = Path(directory)
    if (autoencoder is None) != (config.autoencoder is None):
        given, configured = autoencoder is not None, config.autoencoder is not None
        raise CheckpointError(f"{target}: autoencoder is given: {given}, in the configuration: {configured}")
    try:
        _check_manifest(config, manifest)
    except ValueError as error:
        raise CheckpointError(f"{target}: {error}") from error
    target.mkdir(parents=True, exist_ok=True)
    write_file(target / "config.json", _json_bytes(config_to_json(config)))
    states = {"denoiser.safetensors": denoiser}
    if autoencoder is not None:
        states["autoencoder.safetensors"] = autoencoder
    for name, state in states.items():
        tensors = {key: _stored(key, value, dtype) for key, value in state.items()}
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            path = Path(scratch) / name
            save_file(tensors, path)
            path.chmod(0o644)  # the library writes 0600; an installed package is read by other users
            sync(path)
            path.replace(target / name)
    records = {
        name: FileRecord(sha256=sha256_of(target / name), size_bytes=(target / name).stat().st_size)
        for name in CHECKED_FILES
        if name == "config.json" or name in states
    }
    written = replace(manifest, files=records)
    write_file(target / "manifest.json", _json_bytes(to_json(written)))
    return written


def load_checkpoint(directory: str | Path) -> LoadedCheckpoint:
    """Read a checkpoint directory after checking every file against the manifest.

    Raises:
        CheckpointError: Anything is missing, truncated, altered, oversized, unknown or does not fit.
    """
    source = Path(directory)
    manifest = read_manifest(source)
    # read once, then hashed and parsed from memory: a file changed meanwhile changes nothing here
    contents = {name: _read_checked(source / name, manifest.files[name]) for name in manifest.files}
    try:
        config_path = source / "config.json"
        config = config_from_json(parse_json(contents["config.json"], name=str(config_path)))
        _check_manifest(config, manifest)
        if manifest.has_autoencoder != (config.autoencoder is not None):
            listed, configured = manifest.has_autoencoder, config.autoencoder is not None
            raise ValueError(f"an autoencoder is in the manifest's files: {listed}, in config.json: {configured}")
        # meta: shapes without memory; the file's tensors become the weights
        with torch.device("meta"), _NoInitialValues():
            autoencoder = None if config.autoencoder is None else VideoAutoencoder(config.autoencoder).eval()
            denoiser = Denoiser(config.denoiser).eval()
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    for name, module in (("autoencoder.safetensors", autoencoder), ("denoiser.safetensors", denoiser)):
        if module is not None:
            _load_weights(contents[name], module, name=str(source / name))
    return LoadedCheckpoint(config, manifest, autoencoder, denoiser)


class _NoInitialValues(TorchFunctionMode):
    """Lets modules be built without their random numbers: on meta those take torch 2 s, to load its compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == torch.nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def add_fingerprints(
    directory: str | Path,
    fingerprints: bytes,
    *,
    max_resemblance: float | None = None,
    metrics: Mapping[str, object] | None = None,
) -> Manifest:
    """Add the fingerprints of its training clips to a checkpoint, in place of any from before.

    Args:
        fingerprints: Of :func:`medsora.fingerprints.fingerprint`, one behind the other.
        max_resemblance: From which on a clip counts as a copy; None: that was not calibrated.
        metrics: How well that works, for the manifest's ``metrics.training_copies``.

    Returns:
        The manifest as written.

    Raises:
        CheckpointError: No checkpoint, or no fingerprints.
    """
    target = Path(directory)
    if not fingerprints or len(fingerprints) % FINGERPRINT_BYTES:
        raise CheckpointError(f"fingerprints have {FINGERPRINT_BYTES} bytes each, got {len(fingerprints)} in all")
    digest = hashlib.sha256(fingerprints).hexdigest()
    record = FingerprintRecord(sha256=digest, size_bytes=len(fingerprints), max_resemblance=max_resemblance)
    written = replace(read_manifest(target), fingerprints=record)
    figures = {name: value for name, value in written.metrics.items() if name != "training_copies"}
    written = replace(written, metrics=figures | ({} if metrics is None else {"training_copies": dict(metrics)}))
    write_file(target / FINGERPRINTS, fingerprints)
    write_file(target / "manifest.json", _json_bytes(to_json(written)))
    return written


def load_fingerprints(directory: str | Path) -> bytes:
    """The fingerprints of the training clips of a checkpoint, one behind the other.

    Raises:
        CheckpointError: It has none, or they were altered.
    """
    record = read_manifest(directory).fingerprints
    if record is None:
        raise CheckpointError(f"{directory} has no fingerprints of its training clips")
    content = _read_checked(Path(directory) / FINGERPRINTS, record)
    if not content or len(content) % FINGERPRINT_BYTES:
        raise CheckpointError(f"{Path(directory) / FINGERPRINTS} holds no whole number of fingerprints")
    return content


def _check_manifest(config: ModelConfig, manifest: Manifest) -> None:
    """Raise ``ValueError`` where labels or limits promise what the networks cannot do."""
    for label in manifest.labels:
        try:
            config.condition_indices(label.condition)
        except ValueError as error:
            raise ValueError(f"label {label.name!r}: {error}") from error
    patch_size, limits = config.denoiser.patch_size, manifest.limits
    for num_frames in limits.num_frames:
        for width, height in limits.sizes:
            if not is_valid_video_shape(num_frames, height, width, patch_size=patch_size):
                raise ValueError(f"limits allow {num_frames} frames of {width}x{height}, which cannot be coded")
    grid, pixels = config.denoiser.position_grid, SPATIAL_STRIDE * patch_size
    if grid is not None and any((height // pixels, width // pixels) != grid for width, height in limits.sizes):
        only = f"{grid[1] * pixels}x{grid[0] * pixels}"
        raise ValueError(f"limits allow sizes {limits.sizes}; positions are stored for {only} alone")
    prediction = config.denoiser.prediction
    if limits.clean_prefixes and prediction != "velocity":
        raise ValueError(f"limits.clean_prefixes is for a predicted velocity; the denoiser predicts {prediction}")
    able = config.denoiser.samplers
    unfit = [name for name in limits.samplers if name not in able]
    if unfit:
        raise ValueError(
            f"limits name samplers that cannot use a predicted {prediction}: {', '.join(unfit)}; "
            f"those that can: {', '.join(able)}"
        )


def _read_checked(path: Path, record: FileRecord) -> bytes:
    content = read_bounded(path, min(record.size_bytes, MAX_WEIGHT_BYTES))
    if len(content) != record.size_bytes:
        raise CheckpointError(f"{path} has {len(content)} bytes, the manifest says {record.size_bytes}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != record.sha256:
        raise CheckpointError(f"{path} was altered: its SHA-256 is {digest}, the manifest says {record.sha256}")
    return content


def _load_weights(content: bytes, module: nn.Module, *, name: str) -> None:
    parse_weight_header(content, name=name)  # its bounds; the values are read by the library
    try:
        stored = load(content)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be read: {error}") from error
    expected = module.state_dict()
    wrong = sorted(set(stored) ^ set(expected))
    if wrong:
        raise CheckpointError(f"{name} has the wrong tensors, first of {len(wrong)}: {', '.join(wrong[:5])}")
    weights = {}
    for key, value in stored.items():
        if value.shape != expected[key].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(expected[key].shape)}"
            raise CheckpointError(f"{name}: tensor {key} has shape {shapes}")
        if value.dtype not in (FLOATS if expected[key].is_floating_point() else (torch.int64,)):
            raise CheckpointError(f"{name}: tensor {key} has type {value.dtype}")
        weights[key] = value.to(expected[key].dtype)
        if not torch.isfinite(weights[key]).all():
            raise CheckpointError(f"{name}: tensor {key} holds values that are not finite")
    module.load_state_dict(weights, strict=True, assign=True)


def _stored(key: str, value: Tensor, dtype: str) -> Tensor:
    value = value.detach().cpu()
    if not value.is_floating_point():
        return value.contiguous()
    stored = value.to(getattr(torch, dtype)).contiguous()
    if not torch.isfinite(stored).all():
        raise CheckpointError(f"tensor {key} is not finite in {dtype}")
    return stored


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def write_tiny_checkpoint(directory: str | Path, *, seed: int = 0, max_frames: int | None = None) -> Path:
    """Write an untrained checkpoint of preset ``tiny``: makes noise, fast. For tests and trying things out.

    16 frames of 32x32 pixels at 8 frames a second, labels ``regular-convex`` and ``covid-convex``.

    Args:
        max_frames: Of a checkpoint that says to be trained with clean prefixes; None is one without.
    """
    config = preset("tiny", {"finding": ("regular", "covid"), "probe": ("convex",)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder, denoiser = VideoAutoencoder(config.require_autoencoder()), Denoiser(config.denoiser)
        # an untrained denoiser predicts exactly nothing (adaLN-Zero); random weights make the output depend on all
        for parameter in denoiser.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.05)
    labels = tuple(
        Label(
            name=f"{finding}-convex",
            description=f"{finding} lung, convex probe (random weights)",
            synonyms=(f"{finding} lung",),
            condition={"finding": finding, "probe": "convex"},
        )
        for finding in ("regular", "covid")
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="tiny",
        description="Untrained weights for tests; its videos are noise.",
        modality="US",
        intended_use="Tests only.",
        licence="Apache-2.0",
        created_at="2026-11-24T00:00:00Z",
        labels=labels,
        limits=Limits(
            sizes=((32, 32),),
            num_frames=(16,),
            fps=8.0,
            num_inference_steps=(1, 4, 1000),
            guidance_scale=(1.0, 1.0, 10.0),
            samplers=("euler", "heun"),
            clean_prefixes=max_frames is not None,
            max_frames=max_frames,
        ),
    )
    save_checkpoint(
        directory,
        config=config,
        autoencoder=autoencoder.state_dict(),
        denoiser=denoiser.state_dict(),
        manifest=manifest,
        dtype="float32",
    )
    return Path(directory)
