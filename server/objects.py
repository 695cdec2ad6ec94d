"""Where bytes are kept: objects by key, below one root, in a folder or in a bucket.

An object appears whole or not at all, and is never changed afterwards. What it is to hold is written into a scratch
file first and published then. The stores that know what the keys mean (videos, uploads, clips of datasets) are built
on this; nothing above them knows which of the two it is.
"""

import errno
import io
import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from medsora.files import sync
from server.settings import Settings

__all__ = [
    "FoundObject",
    "GrowingObject",
    "LocalObjects",
    "Objects",
    "StorageFullError",
    "StorageUnavailableError",
    "is_full",
    "nearest_folder",
    "objects_of",
    "on_disk",
]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class StorageFullError(Exception):
    """There is no room for the file; nothing of it is left."""


class StorageUnavailableError(OSError):
    """The bucket cannot be reached, refuses, or is not there. Says what to do; nothing is wrong with the object."""


@dataclass(frozen=True, kw_only=True)
class FoundObject:
    """An object, or a scratch file beside the objects, and the seconds since it was last written."""

    key: str
    size_bytes: int
    age_s: float


class GrowingObject(ABC):
    """Something that is read while it is written. A context manager; what was written stays."""

    @abstractmethod
    def write(self, content: bytes) -> None:
        """Append."""

    @abstractmethod
    def flush(self) -> None:
        """Let followers see all of it."""

    def __enter__(self) -> "GrowingObject":
        return self

    def __exit__(self, kind: type[BaseException] | None, *about: object) -> None:
        if kind is None:
            self.flush()


class Objects(ABC):
    """A root of objects. Keys are relative paths, such as ``ab/video_1.mp4``; their safety is the caller's.

    Where an object is not there, methods raise FileNotFoundError; all may raise :class:`StorageUnavailableError`.

    Args:
        scratch: Folder for what is being written.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    def stage(self, name: str) -> Path:
        """The path of a scratch file of that name, whose folder is there then."""
        path = self._scratch / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    @abstractmethod
    def publish(self, staged: Mapping[Path, str]) -> None:
        """Give scratch files that are on the disk (:func:`medsora.files.sync`) their keys; they are gone then.

        Raises:
            StorageFullError: No room in the bucket.
        """

    @abstractmethod
    def size(self, key: str) -> int:
        """Bytes of an object."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """An object to be read from any place, a piece at a time."""

    @abstractmethod
    def local(self, key: str) -> AbstractContextManager[Path]:
        """The object as a file on this machine, for those that want a path. Not to be changed.

        Raises:
            FileNotFoundError: It is not there.
        """

    @abstractmethod
    def copy(self, origin: "Objects", origin_key: str, key: str) -> None:
        """Make an object with the bytes of one of another root of the same kind."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove an object for good; nothing happens when it is not there."""

    @abstractmethod
    def remove_below(self, folder: str) -> None:
        """Remove all objects of a folder, and below it."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[FoundObject]:
        """All objects whose keys begin so, by key; scratch files beside them, too."""

    @abstractmethod
    def grow(self, key: str) -> GrowingObject:
        """Begin an object that can be followed meanwhile."""

    @abstractmethod
    def follow(self, key: str) -> BinaryIO:
        """What :meth:`grow` has written so far, and more whenever there is more."""

    @abstractmethod
    def probe(self) -> None:
        """Write and remove a small object.

        Raises:
            OSError: That is not possible.
        """

    def sweep_unfinished(self, *, older_than_s: float) -> int:
        """Remove what broken-off writes have left where :meth:`list` does not show it; returns their number."""
        return 0

    def link(self, key: str, *, disposition: str | None, media_type: str) -> str | None:
        """Address from which a client may download the object by itself for a while; None: there is none.

        Args:
            disposition: Content-Disposition of the download.
        """
        return None

    def free_bytes(self) -> int:
        """Free bytes on the disk that new objects are written to first."""
        return shutil.disk_usage(nearest_folder(self._scratch)).free


class LocalObjects(Objects):
    """Objects that are files below a folder. Scratch files lie beside them.

    Args:
        root: Made when the first object is written.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root

    def path(self, key: str) -> Path:
        """Where an object lies."""
        return self.root / key

    def publish(self, staged: Mapping[Path, str]) -> None:
        folders = set()
        for path, key in staged.items():
            target = self.path(key)
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.replace(target)
            folders.add(target.parent)
        for folder in folders:
            sync(folder)

    def size(self, key: str) -> int:
        return self.path(key).stat().st_size

    def open(self, key: str) -> BinaryIO:
        return self.path(key).open("rb")

    @contextmanager
    def local(self, key: str) -> Iterator[Path]:
        self.size(key)  # raises where there is none
        yield self.path(key)

    def copy(self, origin: Objects, origin_key: str, key: str) -> None:
        if not isinstance(origin, LocalObjects):
            raise TypeError(f"objects in a folder are copied from a folder, not from {type(origin).__name__}")
        source, target = origin.path(origin_key), self.path(key)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.link(source, target)  # the bytes stay when the other name goes
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(source, target)  # another disk, or one without links
            sync(target)
        sync(target.parent)

    def remove(self, key: str) -> None:
        path = self.path(key)
        try:
            path.unlink()
        except FileNotFoundError:
            return
        sync(path.parent)

    def remove_below(self, folder: str) -> None:
        shutil.rmtree(self.path(folder), ignore_errors=True)

    def list(self, prefix: str = "") -> Iterator[FoundObject]:
        folder, _, name = prefix.rpartition("/")
        yield from self._list(self.root / folder, f"{folder}/" if folder else "", name, time.time())

    def _list(self, folder: Path, prefix: str, name: str, now: float) -> Iterator[FoundObject]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if not entry.name.startswith(name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._list(Path(entry.path), f"{prefix}{entry.name}/", "", now)
                continue
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue
            yield FoundObject(key=prefix + entry.name, size_bytes=stat.st_size, age_s=now - stat.st_mtime)

    def grow(self, key: str) -> GrowingObject:
        return _GrowingFile(self.stage(key))

    def follow(self, key: str) -> BinaryIO:
        return self.open(key)

    def probe(self) -> None:
        folder = self.stage("probe").parent
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as file:
            file.write(b"probe")
            file.flush()
            os.fsync(file.fileno())


class _GrowingFile(GrowingObject):
    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path, "w")  # unbuffered, so that whoever follows sees it at once

    def write(self, content: bytes) -> None:
        while content:
            content = content[self._file.write(content) :]

    def flush(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *about: object) -> None:
        self._file.close()


def objects_of(settings: Settings, kind: Literal["artifacts", "files", "datasets", "sources"]) -> Objects:
    """The objects of that kind: in the bucket of ``storage_url``, else in a folder of ``data_dir``.

    Raises:
        SettingsError: A bucket is named, and what reads buckets is not installed.
    """
    if settings.storage_url is None:
        return LocalObjects(settings.data_dir / kind)
    from server.s3 import s3_objects

    return s3_objects(settings, kind)


def on_disk(objects: Objects) -> LocalObjects:
    """The objects as what they are where they lie in a folder: there each has a path.

    Raises:
        ValueError: They are in a bucket.
    """
    if not isinstance(objects, LocalObjects):
        raise ValueError("files that are kept in a bucket have no path here")
    return objects


def nearest_folder(path: Path) -> Path:
    """A path, or what is there of the folders above it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is the disk, the quota or the file size limit being used up."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
