"""What a checkpoint says of itself: labels, limits, provenance, hashes (``manifest.json``).

Read by the HTTP process, so nothing here may load torch. The weights themselves are read and checked by
:mod:`medsora.checkpoint`.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from medsora.config import SHORTCUT
from medsora.errors import CheckpointError
from medsora.files import read_bounded
from medsora.geometry import CHUNK_FRAMES
from medsora.jsonconfig import from_json

__all__ = [
    "CHECKED_FILES",
    "FORMAT_VERSION",
    "FileRecord",
    "FingerprintRecord",
    "Label",
    "Limits",
    "Manifest",
    "find_checkpoint",
    "list_checkpoints",
    "normalise_label",
    "parse_json",
    "read_manifest",
]

FORMAT_VERSION = 1
CHECKED_FILES = ("config.json", "autoencoder.safetensors", "denoiser.safetensors")
"""What a checkpoint holds beside its manifest, which has size and hash of each. The autoencoder may be left out."""
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
    shortcut_steps: tuple[int, ...] = ()
    """Numbers of steps that the sampler ``shortcut`` was trained for, its default first: it takes these alone."""
    shortcut_guidance: float = 1.0
    """Guidance that is built into it, and cannot be chosen."""
    clean_prefixes: bool = False
    """Whether the denoiser was trained to go on from frames that it is given clean: what clips that begin with given
    frames, and those longer than any of ``num_frames``, need."""
    max_frames: int | None = None
    """With clean prefixes: frames of the longest clip, made in windows; every multiple of 8 up to it can be had."""

    def default_steps(self, sampler: str) -> int:
        """Steps that a sampler takes unless others are asked for."""
        return self.shortcut_steps[0] if sampler == SHORTCUT else self.num_inference_steps[1]

    def default_guidance(self, sampler: str) -> float:
        """Guidance that a sampler has unless another is asked for."""
        return self.shortcut_guidance if sampler == SHORTCUT else self.guidance_scale[1]

    @property
    def window(self) -> int:
        """Frames that are sampled at once: the most that the denoiser was trained for."""
        return max(self.num_frames)

    @property
    def longest(self) -> int:
        """Frames of the longest clip."""
        return self.window if self.max_frames is None else self.max_frames

    def can_make(self, num_frames: int) -> bool:
        """Whether a clip of that many frames can be had."""
        in_windows = self.clean_prefixes and num_frames % CHUNK_FRAMES == 0 < num_frames
        return num_frames in self.num_frames or (in_windows and self.window < num_frames <= self.longest)

    @property
    def lengths(self) -> tuple[str, ...]:
        """Every length in frames that can be had, in words."""
        beyond = self.window + CHUNK_FRAMES
        if self.longest < beyond:
            return tuple(map(str, self.num_frames))
        return (*map(str, self.num_frames), f"multiples of {CHUNK_FRAMES} from {beyond} to {self.longest}")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Hash and size that a weight file must have."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class FingerprintRecord(FileRecord):
    """The same of ``fingerprints.bin``, and what they are to be compared by."""

    max_resemblance: float | None = None
    """Above this resemblance a clip counts as a copy of a training clip
    (:class:`medsora.fingerprints.TrainingFingerprints`); None: it was not calibrated."""


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
    fingerprints: FingerprintRecord | None = None
    """Small pictures of the training clips, to tell copies of them by; None: there are none."""
    training_data: tuple[dict[str, str], ...] = ()
    """One entry a clip: file, licence, source, attribution."""
    training: dict[str, Any] = field(default_factory=dict)
    """How it was trained: recipes, steps, seconds, device."""
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = self.limits
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format_version is {self.format_version}, this version reads {FORMAT_VERSION}")
        if not self.labels:
            raise ValueError("labels must be there")
        owners: dict[str, str] = {}
        for label in self.labels:
            for text in (label.name, *label.synonyms):
                owner = owners.setdefault(normalise_label(text), label.name)
                if owner != label.name or not normalise_label(text):
                    raise ValueError(f"labels: {text!r} of {label.name!r} is empty, or also means {owner!r}")
        if len(set(self.label_names)) != len(self.labels):
            raise ValueError(f"labels must have different names, got {list(self.label_names)}")
        if not (limits.sizes and limits.num_frames and limits.samplers and limits.fps > 0):
            raise ValueError("limits must name at least one size, num_frames and sampler, and fps above 0")
        if (SHORTCUT in limits.samplers) != bool(limits.shortcut_steps):
            raise ValueError(f"limits.shortcut_steps go with the sampler {SHORTCUT}, got {limits.shortcut_steps}")
        if not all(steps >= 1 for steps in limits.shortcut_steps) or not limits.shortcut_guidance >= 1:
            raise ValueError(
                f"limits.shortcut_steps and shortcut_guidance must be 1 or more, got {limits.shortcut_steps} and "
                f"{limits.shortcut_guidance}"
            )
        for key, (low, default, high) in (
            ("num_inference_steps", limits.num_inference_steps),
            ("guidance_scale", limits.guidance_scale),
        ):
            if not 1 <= low <= default <= high:
                raise ValueError(f"limits.{key} must rise from 1 or more, got {(low, default, high)}")
        if limits.clean_prefixes and limits.window < 2 * CHUNK_FRAMES:
            raise ValueError(
                f"limits.clean_prefixes needs windows of {2 * CHUNK_FRAMES} frames or more: a known chunk of "
                f"{CHUNK_FRAMES} and a new one; limits.num_frames are {limits.num_frames}"
            )
        most = None if self.fingerprints is None else self.fingerprints.max_resemblance
        if most is not None and not 0 < most < 1:
            raise ValueError(f"fingerprints.max_resemblance must lie between 0 and 1, got {most}")
        if limits.max_frames is not None and not (
            limits.clean_prefixes and limits.max_frames >= limits.window and limits.max_frames % CHUNK_FRAMES == 0
        ):
            raise ValueError(
                f"limits.max_frames must be a multiple of {CHUNK_FRAMES}, from {limits.window} on, and only with "
                f"limits.clean_prefixes; got {limits.max_frames}"
            )

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of all labels, in the checkpoint's order."""
        return tuple(label.name for label in self.labels)

    @property
    def has_autoencoder(self) -> bool:
        """Whether the checkpoint makes video; without an autoencoder it makes latents."""
        return "autoencoder.safetensors" in self.files

    def seconds_for(self, num_frames: int) -> str:
        """Length of a clip in seconds as the API writes it: ``"2"``, or ``"1.6"`` where it is no whole number."""
        return f"{num_frames / self.limits.fps:.3f}".rstrip("0").rstrip(".")


def normalise_label(text: str) -> str:
    """A label's name as it is compared: lower case, words and numbers only, single spaces.

    >>> normalise_label("Covid-19,  CONVEX")
    'covid 19 convex'
    """
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def parse_json(content: bytes, *, name: str) -> Any:
    """Parse a JSON file of a checkpoint, strictly.

    Args:
        name: Of the file, for messages.

    Raises:
        CheckpointError: No valid JSON, a key given twice, a number that is not finite, or a text with control
            characters (which a terminal that shows it would obey).
    """
    try:
        value = json.loads(content, object_pairs_hook=_object, parse_constant=_refuse_constant)
        _refuse_control_characters(value)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is no valid JSON: {error}") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _refuse_control_characters(value: Any) -> None:
    if isinstance(value, str) and re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", value):
        raise ValueError(f"control characters in {value[:40]!r}")
    if isinstance(value, dict):
        _refuse_control_characters(list(value))
        _refuse_control_characters(list(value.values()))
    if isinstance(value, list):
        for item in value:
            _refuse_control_characters(item)


def read_manifest(directory: str | Path) -> Manifest:
    """Read and check ``manifest.json`` of a checkpoint directory; loads no torch, reads no weights.

    Raises:
        CheckpointError: The file is missing, larger than 4 MiB, no JSON, or has unknown or bad keys.
    """
    path = Path(directory) / "manifest.json"
    try:
        value = parse_json(read_bounded(path, MAX_JSON_BYTES), name=str(path))
        manifest = from_json(Manifest, value, where="manifest.json")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if set(manifest.files) | {"autoencoder.safetensors"} != set(CHECKED_FILES):
        raise CheckpointError(
            f"{path} must list exactly {', '.join(CHECKED_FILES)} (the autoencoder may be left out); "
            f"it lists {', '.join(sorted(manifest.files)) or 'nothing'}"
        )
    return manifest


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
