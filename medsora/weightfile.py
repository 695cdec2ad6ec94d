"""What can be told of a file of weights without loading it: its hash, and its safetensors header. Torch-free."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from medsora.errors import CheckpointError

__all__ = ["read_weight_header", "sha256_of"]

# The library itself would take a header of 100 MB with a million tensors, which costs it a gigabyte.
MAX_HEADER_BYTES = 10 * 2**20
MAX_TENSORS = 20_000


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weight_header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: type, shape and place of each tensor by name, without its metadata.

    Raises:
        CheckpointError: It is no safetensors file, or its header is larger than 10 MiB or 20,000 tensors.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is no safetensors file, or its header exceeds {MAX_HEADER_BYTES} bytes")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has no valid safetensors header: {error}") from error
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path} has no valid safetensors header, or more than {MAX_TENSORS} tensors")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}
