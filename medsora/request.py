"""What is asked of a checkpoint: one clip, fully described and checked against its limits.

Torch-free: the HTTP process refuses with these functions what the worker could not do.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from medsora.errors import RequestError
from medsora.manifest import Label, Manifest, normalise_label

__all__ = [
    "MAX_SEED",
    "GenerationRequest",
    "frames_for_seconds",
    "random_seed",
    "resolve_label",
    "resolve_request",
]

MAX_SEED = 2**63 - 1
"""Largest seed: what a torch generator and a signed database column both hold."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One clip, with every choice made. Build it with :func:`resolve_request`, which checks the limits."""

    label: str
    """Name of a label of the checkpoint."""
    seed: int
    """0 to 2**63 - 1; with the other fields and the checkpoint it decides every pixel."""
    num_frames: int
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    num_inference_steps: int
    """Steps of the sampler from noise to data."""
    guidance_scale: float
    """Classifier-free guidance; 1 is none."""
    sampler: str

    @property
    def shape_key(self) -> tuple[int, int, int, int, float, str]:
        """What requests must have in common to be sampled as one batch."""
        steps, guidance = self.num_inference_steps, self.guidance_scale
        return (self.num_frames, self.height, self.width, steps, guidance, self.sampler)


def random_seed() -> int:
    """Draw a seed for a request that names none. Below 2**53, so that JSON readers keep it exact."""
    return secrets.randbelow(2**53)


def resolve_label(manifest: Manifest, text: str) -> Label:
    """Find the label that a text names: a name or synonym, whatever its case and punctuation.

    Raises:
        RequestError: No label is called so; the error lists the names.
    """
    wanted = normalise_label(text)
    for label in manifest.labels:
        if wanted in {normalise_label(name) for name in (label.name, *label.synonyms)}:
            return label
    shown = text if len(text) <= 80 else text[:77] + "..."
    raise RequestError("label", f"{manifest.name} has no label {shown!r}", manifest.label_names)


def frames_for_seconds(manifest: Manifest, seconds: str) -> int:
    """Frames of a clip that lasts ``seconds``, e.g. ``"2"``.

    Raises:
        RequestError: No number, or a length the checkpoint cannot make.
    """
    for num_frames in manifest.limits.num_frames:
        try:
            if math.isclose(float(seconds), float(manifest.seconds_for(num_frames)), abs_tol=1e-9):
                return num_frames
        except ValueError:
            break
    allowed = [manifest.seconds_for(num_frames) for num_frames in manifest.limits.num_frames]
    raise RequestError("seconds", f"{manifest.name} cannot make {str(seconds)[:40]!r} seconds", allowed)


def resolve_request(
    manifest: Manifest,
    *,
    label: str,
    seed: int,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
) -> GenerationRequest:
    """Fill in the checkpoint's defaults for what is None, and check everything against its limits.

    Args:
        label: A name or synonym of a label.
        height: Pixels; give both height and width, or neither.

    Raises:
        RequestError: With the field, and the values allowed for it.
    """
    limits = manifest.limits
    steps_low, steps_default, steps_high = limits.num_inference_steps
    guidance_low, guidance_default, guidance_high = limits.guidance_scale
    if not 0 <= seed <= MAX_SEED:
        raise RequestError("seed", f"{seed} is out of range", [f"0 to {MAX_SEED}"])
    size = limits.sizes[0]
    if (width is None) != (height is None):
        raise RequestError("size", "width and height must be given together", _size_names(limits.sizes))
    if width is not None and height is not None:
        size = (width, height)
    if size not in limits.sizes:
        name = f"{size[0]}x{size[1]}"
        raise RequestError("size", f"{manifest.name} cannot make {name}", _size_names(limits.sizes))
    frames = limits.num_frames[0] if num_frames is None else num_frames
    if frames not in limits.num_frames:
        raise RequestError("num_frames", f"{manifest.name} cannot make {frames} frames", limits.num_frames)
    steps = steps_default if num_inference_steps is None else num_inference_steps
    if not steps_low <= steps <= steps_high:
        raise RequestError("num_inference_steps", f"{steps} is out of range", [f"{steps_low} to {steps_high}"])
    guidance = guidance_default if guidance_scale is None else float(guidance_scale)
    if not guidance_low <= guidance <= guidance_high:  # also refuses nan
        allowed = [f"{guidance_low:g} to {guidance_high:g}"]
        raise RequestError("guidance_scale", f"{guidance} is out of range", allowed)
    chosen = limits.samplers[0] if sampler is None else sampler
    if chosen not in limits.samplers:
        raise RequestError("sampler", f"{manifest.name} has no sampler {chosen[:40]!r}", limits.samplers)
    return GenerationRequest(
        label=resolve_label(manifest, label).name,
        seed=seed,
        num_frames=frames,
        height=size[1],
        width=size[0],
        num_inference_steps=steps,
        guidance_scale=guidance,
        sampler=chosen,
    )


def _size_names(sizes: Sequence[tuple[int, int]]) -> list[str]:
    return [f"{width}x{height}" for width, height in sizes]
