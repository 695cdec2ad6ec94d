"""Weights that others published: read as data, whatever they are kept in."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from training.errors import TrainingError

__all__ = ["read_weights"]


def read_weights(path: Path, what: str) -> dict[str, Tensor]:
    """Tensors of a file by name.

    Args:
        path: ``.safetensors``, or a torch file that holds nothing but tensors.
        what: The network they belong to, for the message.

    Raises:
        TrainingError: No such file, unreadable, or more than tensors in it.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # weights_only: the file can hold tensors and nothing that runs
        found = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises half a dozen unrelated types for a damaged file
        raise TrainingError(f"{what} weights {path} cannot be read: {error}") from error
    if not all(isinstance(value, Tensor) for value in found.values()):
        raise TrainingError(f"{what} weights {path} cannot be read: the file holds more than named tensors")
    return found
