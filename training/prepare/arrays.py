"""Arrays that a network makes from cached clips, such as latents or flow features, kept beside the frames. Torch-free.

They are named after the hash of what made them, so that those of another network are never taken for them, and a
cache may hold those of several. The index is replaced last: what is listed is whole.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from medsora.files import sync, write_file
from training.errors import DataError
from training.prepare.cache import (
    INDEX,
    ArrayRecord,
    Cache,
    CachedClip,
    CacheIndex,
    FileRecord,
    index_bytes,
    open_cache,
)

__all__ = ["ArrayFunction", "add_arrays", "drop_arrays"]

ArrayFunction = Callable[[CachedClip, np.ndarray], Mapping[str, np.ndarray]]
"""Gets a clip and its frames, uint8 (frames, height, width, 3); returns arrays by name."""

MAX_FILE_BYTES = 64 * 2**20


def add_arrays(
    path: Path,
    name: str,
    function: ArrayFunction,
    *,
    key: str,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> ArrayRecord:
    """Run a function on every clip of a cache and store what it returns.

    Clips come one by one in the cache's order; every shard is read once.

    Args:
        path: Folder of the cache.
        name: What the arrays are, e.g. ``latents``.
        key: Hash of the network and settings behind ``function``. Arrays of this name and key that are there already
            stay, and ``function`` is not called.
        about: Facts for the record, e.g. the network's file name and hash.
        progress: Gets the number of clips that are done, their total, and the name of the last.

    Raises:
        DataError: The cache is damaged, or ``name`` or ``key`` is no plain word.
    """
    for word, value in (("name", name), ("key", key)):
        if not re.fullmatch(r"[A-Za-z0-9_]{1,64}", value):
            raise DataError(f"{word} of arrays must be letters, digits and _, got {value!r}")
    cache = open_cache(path)
    known = cache.find_arrays(name, key)
    if known is not None:
        return known
    files: dict[str, FileRecord] = {}
    pending: dict[str, np.ndarray] = {}
    clips = 0

    def flush() -> None:
        nonlocal pending, clips
        if pending:
            file = f"{name}-{key[:16]}-{len(files):05d}.safetensors"
            sha256, size = write_file(path / file, save(pending))
            files[file] = FileRecord(sha256=sha256, size_bytes=size, frames=clips)
        pending, clips = {}, 0

    total = len(cache.index.clips)
    for number, (clip, frames) in enumerate(cache.iterate(cache.index.clips)):
        for part, array in function(clip, frames).items():
            pending[f"{number}/{part}"] = np.ascontiguousarray(array)
        clips += 1
        if sum(array.nbytes for array in pending.values()) >= MAX_FILE_BYTES:
            flush()
        progress(number + 1, total, clip.name)
    flush()
    record = ArrayRecord(name=name, key=key, about=dict(about or {}), files=files)
    _write_index(path, cache, (*cache.index.arrays, record))
    return record


def drop_arrays(path: Path, name: str, key: str) -> bool:
    """Take arrays out of a cache.

    Returns:
        Whether there were any.
    """
    cache = open_cache(path)
    record = cache.find_arrays(name, key)
    if record is None:
        return False
    _write_index(path, cache, tuple(other for other in cache.index.arrays if other != record))
    for file in record.files:
        (path / file).unlink(missing_ok=True)
    return True


def _write_index(path: Path, cache: Cache, arrays: tuple[ArrayRecord, ...]) -> None:
    index: CacheIndex = replace(cache.index, arrays=arrays)
    sync(path)
    write_file(path / INDEX, index_bytes(index))
    sync(path)
