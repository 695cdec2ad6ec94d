"""What a checkpoint says of itself: labels, limits, provenance, hashes (``manifest.json``).

Read by the HTTP process, so nothing here may load torch. The weights themselves are read and checked by
:mod:`medsora.checkpoint`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medsora.errors import CheckpointError
from medsora.jsonconfig import from_json

__all__ = [
    "FORMAT_VERSION",
    "FileRecord",
    "Label",
    "Limits",
    "Manifest",
    "find_checkpoint",
    "list_checkpoints",
    "read_json",
    "read_manifest",
]

FORMAT_VERSION = 1
SHIPPED = Path(__file__).parent / "checkpoints"
MAX_JSON_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Label:
    """One thing that can be asked for.

    ``condition`` names one value for each condition of the model, e.g. ``{"finding": "covid", ...}``.
    """

    name: str
    description: str
    synonyms: tuple[str, ...] = ()
    condition: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the checkpoint can do. Of each list the first is the default."""

    sizes: tuple[tuple[int, int], ...]
    """(width, height) in pixels."""
    num_frames: tuple[int, ...]
    fps: float
    """Frames a second of the training windows: the only rate at which motion is right."""
    num_inference_steps: tuple[int, int, int]
    """Least, default, most."""
    guidance_scale: tuple[float, float, float]
    """Least, default, most; 1 is no guidance."""
    samplers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Hash and size that a weight file must have."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but its weights and network shape."""

    format_version: int
    name: str
    description: str
    modality: str
    """DICOM modality code, e.g. ``US``."""
    intended_use: str
    licence: str
    created_at: str
    """ISO 8601, UTC."""
    labels: tuple[Label, ...]
    limits: Limits
    files: dict[str, FileRecord] = field(default_factory=dict)
    training_data: tuple[dict[str, str], ...] = ()
    """One entry a clip: file, licence, source, attribution."""
    training: dict[str, Any] = field(default_factory=dict)
    """How it was trained: recipes, steps, seconds, device."""
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = self.limits
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format_version is {self.format_version}, this version reads {FORMAT_VERSION}")
        names = [label.name for label in self.labels]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"labels must be there and have different names, got {names}")
        if not (limits.sizes and limits.num_frames and limits.samplers and limits.fps > 0):
            raise ValueError("limits must name at least one size, num_frames and sampler, and fps above 0")
        for key, (low, default, high) in (
            ("num_inference_steps", limits.num_inference_steps),
            ("guidance_scale", limits.guidance_scale),
        ):
            if not 1 <= low <= default <= high:
                raise ValueError(f"limits.{key} must rise from 1 or more, got {(low, default, high)}")

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of all labels, in the checkpoint's order."""
        return tuple(label.name for label in self.labels)

    def seconds_for(self, num_frames: int) -> str:
        """Length of a clip in seconds as the API writes it: ``"2"``, or ``"1.6"`` where it is no whole number."""
        return f"{num_frames / self.limits.fps:.3f}".rstrip("0").rstrip(".")


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint, at most 4 MiB.

    Raises:
        CheckpointError: No such file, too large, or no valid JSON.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} allowed")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from error


def read_manifest(directory: str | Path) -> Manifest:
    """Read and check ``manifest.json`` of a checkpoint directory; loads no torch, reads no weights.

    Raises:
        CheckpointError: The file is missing, too large, no JSON, or has unknown or bad keys.
    """
    path = Path(directory) / "manifest.json"
    try:
        return from_json(Manifest, read_json(path), where="manifest.json")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def list_checkpoints() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/manifest.json"))


def find_checkpoint(name_or_path: str | Path) -> Path:
    """Directory of a checkpoint, given its path or the name of one that comes with the package.

    Raises:
        CheckpointError: Neither; the message lists the known names.
    """
    name = str(name_or_path)
    if name in list_checkpoints():
        return SHIPPED / name
    path = Path(name_or_path)
    if (path / "manifest.json").is_file():
        return path
    raise CheckpointError(
        f"no checkpoint {name!r}: give a directory with a manifest.json, or one of: "
        f"{', '.join(list_checkpoints()) or '(none shipped)'}"
    )
