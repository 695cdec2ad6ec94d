"""Bytes of files on disk. Under the name of a file there is always a whole one, never a part.

They lie in ``<root>/<2 hex digits>/<file id>``; while one is written, in ``<file id>.<random>.part`` beside it.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from medsora.files import sync
from server.files.model import is_file_id
from server.storage import StorageFullError

__all__ = ["FileStore", "FileWriter", "FoundFile", "WrittenFile"]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NAME = re.compile(r"(?P<id>file-[0-9a-f]{32})(?P<part>\.[0-9a-f]{16}\.part)?")


@dataclass(frozen=True)
class WrittenFile:
    """Size in bytes and SHA-256 of a file that was written."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class FoundFile:
    """A file, or a part of one, found on disk; ``age_s`` seconds since it was last written."""

    path: Path
    file_id: str
    age_s: float
    is_partial: bool


class FileStore:
    """Folder of files on a local disk.

    Args:
        root: Made when the first file is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file lie.

        Raises:
            ValueError: Not the id of a file.
        """
        if not is_file_id(file_id):
            raise ValueError(f"not a file id: {file_id!r}")
        return self.root / file_id[5:7] / file_id

    def writer(self, file_id: str) -> "FileWriter":
        """Begin a file. Use it as a context manager: without :meth:`FileWriter.publish` nothing is left."""
        return FileWriter(self.path(file_id))

    def remove(self, file_id: str) -> None:
        """Remove a file for good; nothing happens when it is not there."""
        self.path(file_id).unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Free bytes on the disk that holds the store (or will)."""
        folder = self.root
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def files(self) -> Iterator[FoundFile]:
        """Everything in the store, in no order."""
        now = time.time()
        for shard in sorted(self.root.glob("[0-9a-f][0-9a-f]")):
            for entry in os.scandir(shard):
                match = _NAME.fullmatch(entry.name)
                if match is None:
                    continue
                try:
                    modified = entry.stat().st_mtime
                except FileNotFoundError:
                    continue
                yield FoundFile(Path(entry.path), match["id"], now - modified, match["part"] is not None)


class FileWriter:
    """A file that is being written: hashed on the way, on disk and under its name after :meth:`publish`."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._partial = target.with_name(f"{target.name}.{secrets.token_hex(8)}.part")
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None
        self.size_bytes = 0

    def __enter__(self) -> "FileWriter":
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
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
        """
        assert self._file is not None
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self._target)
            sync(self._target.parent)
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
            self._partial.unlink(missing_ok=True)


def _explained(error: OSError) -> Exception:
    return StorageFullError("no room for the file") if error.errno in _FULL else error
