"""Tensors that a run made once and keeps in a file, under a key that says what they were made from."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["keep_tensors", "kept_tensors"]


def kept_tensors(path: Path, *, key: str, device: torch.device) -> dict[str, Tensor] | None:
    """What :func:`keep_tensors` wrote; None where there is no file, a damaged one, or one of another key."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            if (stored.metadata() or {}).get("key") != key:
                return None
            return {name: stored.get_tensor(name).to(device) for name in stored.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError):
        return None  # no loss: it is made again


def keep_tensors(path: Path, tensors: Mapping[str, Tensor], *, key: str) -> None:
    """Write a safetensors file under a temporary name and rename it; an older one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary, metadata={"key": key})
    temporary.replace(path)
