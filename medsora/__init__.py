"""MedSora: latent video diffusion for synthetic medical video.

The public names below are resolved on first use, so that ``import medsora`` stays cheap and loads no torch:
the HTTP process of the server shares this package's words (requests, labels, limits) and never its tensors.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medsora.checkpoint import load_checkpoint, save_checkpoint
    from medsora.errors import (
        BackendError,
        CheckpointError,
        GenerationCanceled,
        MedsoraError,
        RequestError,
        VideoError,
    )
    from medsora.manifest import Manifest, find_checkpoint, list_checkpoints, read_manifest
    from medsora.pipeline import VideoPipeline
    from medsora.request import GenerationRequest, resolve_request

__version__ = "0.1.0"

_HOMES = {
    "BackendError": "medsora.errors",
    "CheckpointError": "medsora.errors",
    "GenerationCanceled": "medsora.errors",
    "GenerationRequest": "medsora.request",
    "Manifest": "medsora.manifest",
    "MedsoraError": "medsora.errors",
    "RequestError": "medsora.errors",
    "VideoError": "medsora.errors",
    "VideoPipeline": "medsora.pipeline",
    "find_checkpoint": "medsora.manifest",
    "list_checkpoints": "medsora.manifest",
    "load_checkpoint": "medsora.checkpoint",
    "read_manifest": "medsora.manifest",
    "resolve_request": "medsora.request",
    "save_checkpoint": "medsora.checkpoint",
}

__all__ = [
    "BackendError",
    "CheckpointError",
    "GenerationCanceled",
    "GenerationRequest",
    "Manifest",
    "MedsoraError",
    "RequestError",
    "VideoError",
    "VideoPipeline",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "read_manifest",
    "resolve_request",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'medsora' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
