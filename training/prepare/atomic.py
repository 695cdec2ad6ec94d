"""Files and folders that are there whole or not at all. Torch-free."""

import hashlib
import os
import shutil
from pathlib import Path

__all__ = ["put_in_place", "sync_folder", "write_file"]


def write_file(path: Path, content: bytes) -> tuple[str, int]:
    """Write, sync and rename.

    Returns:
        SHA-256 and size.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return hashlib.sha256(content).hexdigest(), len(content)


def sync_folder(path: Path) -> None:
    """Make the names in a folder lasting."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(finished: Path, target: Path) -> None:
    """Rename a finished folder to its place; an older one there is removed once the new one stands."""
    sync_folder(finished)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.replace(old)
    finished.replace(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
