"""Bytes of files. Under the name of a file there is always a whole one, never a part.

They are objects (``server/objects.py``) with keys ``<2 hex digits>/<file id>``; while one is written, it is in
``<file id>.<random>.part``.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from server.files.model import is_file_id
from server.objects import LocalObjects, Objects, StorageFullError, is_full, on_disk

__all__ = ["FileStore", "FileWriter", "FoundFile", "WrittenFile"]

_KEY = re.compile(r"[0-9a-f]{2}/(?P<id>file-[0-9a-f]{32})(?P<part>\.[0-9a-f]{16}\.part)?")


@dataclass(frozen=True)
class WrittenFile:
    """Size in bytes and SHA-256 of a file that was written."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class FoundFile:
    """A file, or a part of one; ``age_s`` seconds since it was last written."""

    key: str
    file_id: str
    age_s: float
    is_partial: bool


class FileStore:
    """Files by their ids.

    Args:
        objects: Where they are kept, or a folder of the local disk.
    """

    def __init__(self, objects: Objects | Path) -> None:
        self.objects = LocalObjects(objects) if isinstance(objects, Path) else objects

    def key(self, file_id: str) -> str:
        """Key of the bytes of a file.

        Raises:
            ValueError: Not the id of a file.
        """
        if not is_file_id(file_id):
            raise ValueError(f"not a file id: {file_id!r}")
        return f"{file_id[5:7]}/{file_id}"

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file lie, where they are kept on this machine.

        Raises:
            ValueError: Not the id of a file, or files are kept in a bucket.
        """
        return on_disk(self.objects).path(self.key(file_id))

    def open(self, file_id: str) -> BinaryIO:
        """The bytes of a file, to be read from any place.

        Raises:
            FileNotFoundError: There is none.
        """
        return self.objects.open(self.key(file_id))

    def local(self, file_id: str) -> AbstractContextManager[Path]:
        """The file on this machine, for those that want a path; of one that is not there opening it may tell."""
        return self.objects.local(self.key(file_id))

    def writer(self, file_id: str) -> "FileWriter":
        """Begin a file. Use it as a context manager: without :meth:`FileWriter.publish` nothing is left."""
        return FileWriter(self.objects, self.key(file_id))

    def remove(self, file_id: str) -> None:
        """Remove a file for good; nothing happens when it is not there."""
        self.objects.remove(self.key(file_id))

    def discard(self, found: FoundFile) -> None:
        """Remove what was found, a part of a file, too."""
        self.objects.remove(found.key)

    def free_bytes(self) -> int:
        """Free bytes on the disk that files are written to first."""
        return self.objects.free_bytes()

    def files(self) -> Iterator[FoundFile]:
        """Everything in the store, in no order."""
        for found in self.objects.list():
            match = _KEY.fullmatch(found.key)
            if match is not None:
                yield FoundFile(found.key, match["id"], found.age_s, match["part"] is not None)


class FileWriter:
    """A file that is being written: hashed on the way, on disk and under its name after :meth:`publish`."""

    def __init__(self, objects: Objects, key: str) -> None:
        self._objects, self._key = objects, key
        self._partial: Path | None = None
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None
        self.size_bytes = 0

    def __enter__(self) -> "FileWriter":
        try:
            self._partial = self._objects.stage(f"{self._key}.{secrets.token_hex(8)}.part")
            self._file = self._partial.open("xb")
        except OSError as error:
            raise _explained(error) from error
        return self

    def write(self, content: bytes) -> None:
        """Append.

        Raises:
            StorageFullError: There is no room.
        """
        assert self._file is not None
        try:
            self._file.write(content)
        except OSError as error:
            raise _explained(error) from error
        self._hash.update(content)
        self.size_bytes += len(content)

    def publish(self) -> WrittenFile:
        """Bring it to the disk and give it its name.

        Raises:
            StorageFullError: There is no room.
            StorageUnavailableError: The bucket does not take it.
        """
        assert self._file is not None
        assert self._partial is not None
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._objects.publish({self._partial: self._key})
        except OSError as error:
            raise _explained(error) from error
        return WrittenFile(self.size_bytes, self._hash.hexdigest())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._file is not None:
                self._file.close()
        except OSError:
            pass  # what was buffered found no room: it is removed now
        finally:
            if self._partial is not None:
                self._partial.unlink(missing_ok=True)


def _explained(error: OSError) -> Exception:
    return StorageFullError("no room for the file") if is_full(error) else error
