"""Files: read bounded, regular ones only; written whole or not at all, and to the disk. Torch-free."""

import hashlib
import json
import os
import stat
import struct
from pathlib import Path
from typing import Any

from medsora.errors import CheckpointError

__all__ = ["parse_weight_header", "read_bounded", "read_weight_header", "sha256_of", "sync", "write_file"]

# The library itself would take a header of 100 MB with a million tensors, which costs it a gigabyte.
MAX_HEADER_BYTES = 10 * 2**20
MAX_TENSORS = 20_000


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> tuple[str, int]:
    """Write under another name, bring to the disk and rename. The folder's names are the caller's to :func:`sync`.

    Returns:
        SHA-256 and size.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return hashlib.sha256(content).hexdigest(), len(content)


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The whole content of a regular file. What is checked afterwards is what was read: nobody can change it.

    Raises:
        CheckpointError: It cannot be read, is no regular file (a pipe or device could block, or never end), or
            is larger than ``max_bytes``.
    """
    try:
        # not blocking: a pipe without a writer would be waited for
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - of a descriptor
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError(f"{path} is no regular file")
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) > max_bytes:
        raise CheckpointError(f"{path} has more than the {max_bytes} bytes allowed")
    return content


def read_weight_header(path: Path) -> dict[str, dict[str, Any]]:
    """:func:`parse_weight_header` of a file, reading no more than its header."""
    with path.open("rb") as file:
        return parse_weight_header(file.read(8 + MAX_HEADER_BYTES), name=str(path))


def parse_weight_header(content: bytes, *, name: str) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: type, shape and place of each tensor by name, without its metadata.

    Args:
        content: The file, or at least its header.
        name: Of the file, for messages.

    Raises:
        CheckpointError: It is no safetensors file, or its header is larger than 10 MiB or 20,000 tensors.
    """
    length = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else MAX_HEADER_BYTES + 1
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{name} is no safetensors file, or its header exceeds {MAX_HEADER_BYTES} bytes")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} has no valid safetensors header: {error}") from error
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise CheckpointError(f"{name} has no valid safetensors header, or more than {MAX_TENSORS} tensors")
    return {key: entry for key, entry in header.items() if key != "__metadata__"}
