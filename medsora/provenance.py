"""What every generated file says about itself: that it is synthetic, and what made it.

Torch-free. Nothing in it changes between two runs of one request, so that equal videos are equal files.
"""

import json
from collections.abc import Mapping
from typing import Any

from medsora.request import GenerationRequest

__all__ = ["DIGITAL_SOURCE_TYPE", "SYNTHETIC_NOTE", "clip_metadata"]

DIGITAL_SOURCE_TYPE = "trainedAlgorithmicMedia"
"""IPTC's term for media made by a trained model."""

SYNTHETIC_NOTE = (
    "Synthetic video made by a generative model (MedSora). It shows no patient. For research only, not for diagnosis."
)


def clip_metadata(
    request: GenerationRequest, *, model: str, model_sha256: str, source: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Container metadata of one clip, for the writers of :mod:`medsora.video_io`.

    Args:
        model: Name of the checkpoint.
        model_sha256: SHA-256 of its ``manifest.json``, which holds the hashes of all its files.
        source: What became of the picture or video that it was made from (``kind``), and its ``sha256``.

    Returns:
        ``title`` and ``description`` for people; ``comment``, JSON that names everything the clip depends on.
        ``digital_source_type`` is the IPTC term for media made by a trained model.
    """
    origin: dict[str, Any] = {
        "synthetic": True,
        "digital_source_type": DIGITAL_SOURCE_TYPE,
        "model": model,
        "model_sha256": model_sha256,
        "label": request.label,
        "seed": request.seed,
        "num_frames": request.num_frames,
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": float(request.guidance_scale),  # 1 and 1.0 are the same clip, and the same bytes
        "sampler": request.sampler,
    }
    if source is not None:
        origin |= {"prefix_frames": request.prefix_frames, "strength": request.strength, "source": dict(source)}
    return {
        "title": f"Synthetic video: {request.label}",
        "comment": json.dumps(origin, sort_keys=True),
        "description": SYNTHETIC_NOTE,
    }
