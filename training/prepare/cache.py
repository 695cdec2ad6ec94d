"""The prepared cache: ``index.json`` and shards of uint8 frames, each checked by its SHA-256. Torch-free.

A shard (safetensors) holds ``frames``, (frames, height, width, 3), of clips of one split, one after another; a clip
may go on in the next shard. Arrays made from the frames by a network, such as latents or flow features, lie in files
of their own beside the shards, named after the hash of that network (:mod:`training.prepare.arrays`).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from medsora.errors import CheckpointError
from medsora.files import read_bounded
from medsora.jsonconfig import from_json, to_json
from training.errors import DataError

__all__ = [
    "FORMAT",
    "INDEX",
    "ArrayRecord",
    "Cache",
    "CacheIndex",
    "CachedClip",
    "FileRecord",
    "Span",
    "index_bytes",
    "is_cache",
    "open_cache",
]

FORMAT, FORMAT_VERSION = "medsora-cache", 1
INDEX = "index.json"
MAX_INDEX_BYTES = 256 * 2**20
MAX_SHARD_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Span:
    """A run of a clip's frames in one shard."""

    shard: str
    offset: int
    count: int


@dataclass(frozen=True, kw_only=True)
class CachedClip:
    """One clip."""

    name: str
    split: str
    group: str
    frames: int
    fps: float
    cuts: tuple[int, ...]
    conditions: dict[str, str]
    licence: str
    source: str
    attribution: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file of the cache."""

    sha256: str
    size_bytes: int
    frames: int
    """Of a shard; number of clips of an array file."""


@dataclass(frozen=True, kw_only=True)
class ArrayRecord:
    """Arrays that a network made from the clips."""

    name: str
    """What they are, e.g. ``latents``."""
    key: str
    """Hash of what made them: network and settings."""
    about: dict[str, Any]
    files: dict[str, FileRecord]


@dataclass(frozen=True, kw_only=True)
class CacheIndex:
    """``index.json``."""

    format: str
    format_version: int
    dataset: str
    modality: str
    height: int
    width: int
    conditions: dict[str, tuple[str, ...]]
    """Values of each condition that the clips have, sorted."""
    clips: tuple[CachedClip, ...]
    shards: dict[str, FileRecord]
    settings: dict[str, Any]
    arrays: tuple[ArrayRecord, ...] = field(default=())


def index_bytes(index: CacheIndex) -> bytes:
    """The index as it is written: the same for the same content."""
    return (json.dumps(to_json(index), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def is_cache(path: Path) -> bool:
    """Whether a path looks like a prepared cache."""
    try:
        with (path / INDEX).open("rb") as file:
            return path.is_dir() and f'"format": "{FORMAT}"'.encode() in file.read()
    except OSError:
        return False


def open_cache(path: Path) -> "Cache":
    """Read a cache's index. Shards are read, and checked, when they are asked for.

    Raises:
        DataError: No cache, one of another version, or a damaged index.
    """
    try:
        tree = json.loads(read_bounded(path / INDEX, MAX_INDEX_BYTES))
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise DataError(f"{path} is no prepared cache")
        if tree.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{path} is a cache of format version {tree.get('format_version')}, this program reads "
                f"{FORMAT_VERSION}: prepare it again"
            )
        index = from_json(CacheIndex, tree, where=INDEX)
        _check(index)
    except (CheckpointError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no usable cache: {error}") from error
    return Cache(path, index)


def _check(index: CacheIndex) -> None:
    names = set()
    for clip in index.clips:
        if clip.name in names:
            raise ValueError(f"clip {clip.name!r} is listed twice")
        names.add(clip.name)
        if sum(span.count for span in clip.spans) != clip.frames:
            raise ValueError(f"the spans of clip {clip.name!r} do not add up to its {clip.frames} frames")
        for span in clip.spans:
            shard = index.shards.get(span.shard)
            if shard is None or span.offset < 0 or span.count < 1 or span.offset + span.count > shard.frames:
                raise ValueError(f"clip {clip.name!r} lies outside of shard {span.shard!r}")
        if any(clip.conditions.get(name) not in values for name, values in index.conditions.items()):
            raise ValueError(f"clip {clip.name!r} has a condition that the index does not list")
    for file in (*index.shards, *(file for record in index.arrays for file in record.files)):
        if Path(file).name != file:
            raise ValueError(f"{file!r} is no plain file name")


class Cache:
    """A prepared cache on disk."""

    def __init__(self, path: Path, index: CacheIndex) -> None:
        self.path, self.index = path, index

    @property
    def sha256(self) -> str:
        """Stands for everything in the cache but arrays: equal for equal frames, labels, splits and settings."""
        bare = CacheIndex(**{**vars(self.index), "arrays": ()})
        return hashlib.sha256(index_bytes(bare)).hexdigest()

    def clips(self, split: str) -> tuple[CachedClip, ...]:
        """Clips of a split, in order."""
        return tuple(clip for clip in self.index.clips if clip.split == split)

    def read_shard(self, name: str) -> np.ndarray:
        """Frames of a shard: uint8 (frames, height, width, 3).

        Raises:
            DataError: The file is missing, or not the one that was written.
        """
        record = self.index.shards[name]
        frames = self._read(name, record).get("frames")
        shape = (record.frames, self.index.height, self.index.width, 3)
        if frames is None or frames.dtype != np.uint8 or frames.shape != shape:
            raise DataError(f"{self.path / name} does not hold uint8 frames of shape {shape}")
        return frames

    def _read(self, name: str, record: FileRecord) -> dict[str, np.ndarray]:
        try:
            content = read_bounded(self.path / name, MAX_SHARD_BYTES)
        except CheckpointError as error:
            raise DataError(str(error)) from error
        # what is checked is what is used
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise DataError(f"{self.path / name} is not the file that the index names (SHA-256): prepare it again")
        try:
            return dict(load(content))
        except SafetensorError as error:
            raise DataError(f"{self.path / name} is damaged: {error}") from error

    def iterate(self, clips: tuple[CachedClip, ...]) -> Iterator[tuple[CachedClip, np.ndarray]]:
        """Clips with their frames, reading every shard once where they come in the cache's order."""
        name, frames = "", np.zeros(0)
        for clip in clips:
            parts = []
            for span in clip.spans:
                if span.shard != name:
                    name, frames = span.shard, self.read_shard(span.shard)
                parts.append(frames[span.offset : span.offset + span.count])
            yield clip, parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_arrays(self, record: ArrayRecord) -> dict[str, dict[str, np.ndarray]]:
        """Arrays by clip name, then by their own name."""
        result: dict[str, dict[str, np.ndarray]] = {}
        for file, entry in record.files.items():
            for name, array in self._read(file, entry).items():
                number, _, part = name.partition("/")
                result.setdefault(self.index.clips[int(number)].name, {})[part] = array
        return result

    def find_arrays(self, name: str, key: str) -> ArrayRecord | None:
        """The arrays of this name that were made with this key, if there are any."""
        for record in self.index.arrays:
            if (record.name, record.key) == (name, key):
                return record
        return None

    def verify(self) -> int:
        """Read and check every file.

        Returns:
            Bytes checked.

        Raises:
            DataError: Naming the first file that is missing or altered.
        """
        files = [self.index.shards, *(record.files for record in self.index.arrays)]
        for name in self.index.shards:
            self.read_shard(name)
        for record in self.index.arrays:
            self.read_arrays(record)
        return sum(record.size_bytes for group in files for record in group.values())
