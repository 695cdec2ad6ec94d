"""What is asked of a checkpoint: one clip, fully described and checked against its limits.

Torch-free: the HTTP process refuses with these functions what the worker could not do.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from medsora.config import SAMPLERS_OF, SHORTCUT
from medsora.errors import RequestError
from medsora.geometry import CHUNK_FRAMES
from medsora.manifest import Label, Limits, Manifest, normalise_label

__all__ = [
    "MAX_SEED",
    "GenerationRequest",
    "frames_for_seconds",
    "no_clean_prefixes",
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
    prefix_frames: int = 0
    """Frames at the beginning that are given; the frames themselves go beside the request."""
    strength: float = 1.0
    """Below 1 the clip is an edit of a given clip of equal shape, which is put back to this time between data and noise
    before it is sampled: the lower, the more of it stays. 1 is from noise alone."""

    @property
    def shape_key(self) -> tuple[int, int, int, int, float, str, int, float]:
        """What requests must have in common to be sampled as one batch."""
        steps, guidance = self.num_inference_steps, self.guidance_scale
        size = (self.num_frames, self.height, self.width)
        return (*size, steps, guidance, self.sampler, self.prefix_frames, self.strength)

    @property
    def source_frames(self) -> int:
        """Frames that must be given beside the request."""
        return self.num_frames if self.strength < 1 else self.prefix_frames


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
    limits = manifest.limits
    try:
        wanted = float(seconds)
    except ValueError:
        wanted = math.nan
    if 0 < wanted * limits.fps <= limits.longest + 1:
        nearest = round(wanted * limits.fps)
        # such as 1.333 where three frames last a second: seconds are written with three digits
        if limits.can_make(nearest) and math.isclose(wanted, float(manifest.seconds_for(nearest)), abs_tol=1e-9):
            return nearest
    allowed = [manifest.seconds_for(num_frames) for num_frames in limits.num_frames]
    if limits.longest > limits.window:
        step, first = manifest.seconds_for(CHUNK_FRAMES), manifest.seconds_for(limits.window + CHUNK_FRAMES)
        allowed.append(f"multiples of {step} from {first} to {manifest.seconds_for(limits.longest)}")
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
    prefix_frames: int = 0,
    strength: float = 1.0,
) -> GenerationRequest:
    """Fill in the checkpoint's defaults for what is None, and check everything against its limits.

    Args:
        label: A name or synonym of a label.
        height: Pixels; give both height and width, or neither.
        prefix_frames: Frames that are given, from 1 to one less than ``num_frames``; 0 is none.
        strength: Of an edit, above 0 and below 1; 1 is none.

    Raises:
        RequestError: With the field, and the values allowed for it.
    """
    limits = manifest.limits
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
    if not limits.can_make(frames):
        raise RequestError("num_frames", f"{manifest.name} cannot make {frames} frames", limits.lengths)
    chosen = _default_sampler(limits, is_edit=strength < 1) if sampler is None else sampler
    if chosen not in limits.samplers:
        raise RequestError("sampler", f"{manifest.name} has no sampler {chosen[:40]!r}", limits.samplers)
    steps = limits.default_steps(chosen) if num_inference_steps is None else num_inference_steps
    guidance = limits.default_guidance(chosen) if guidance_scale is None else float(guidance_scale)
    _check_sampling(limits, chosen, steps, guidance)
    _check_source(manifest, frames, chosen, prefix_frames, strength)
    return GenerationRequest(
        label=resolve_label(manifest, label).name,
        seed=seed,
        num_frames=frames,
        height=size[1],
        width=size[0],
        num_inference_steps=steps,
        guidance_scale=guidance,
        sampler=chosen,
        prefix_frames=prefix_frames,
        strength=float(strength),
    )


def _default_sampler(limits: Limits, *, is_edit: bool) -> str:
    """The first one that can."""
    able = [name for name in limits.samplers if name != SHORTCUT or not is_edit]
    return (able or limits.samplers)[0]


def _check_sampling(limits: Limits, sampler: str, steps: int, guidance: float) -> None:
    """Refuse numbers that the sampler does not take."""
    if sampler == SHORTCUT:
        others = [name for name in limits.samplers if name != SHORTCUT]
        with_other = f"; another number with sampler {' or '.join(others)}" if others else ""
        if steps not in limits.shortcut_steps:
            allowed = [f"{', '.join(map(str, sorted(limits.shortcut_steps)))} with sampler {SHORTCUT}{with_other}"]
            raise RequestError("num_inference_steps", f"{steps} steps cannot be taken by {SHORTCUT}", allowed)
        if guidance != limits.shortcut_guidance:  # also refuses nan
            allowed = [f"{limits.shortcut_guidance:g}, which is built into sampler {SHORTCUT}{with_other}"]
            raise RequestError("guidance_scale", f"{guidance} cannot be chosen with {SHORTCUT}", allowed)
        return
    steps_low, _, steps_high = limits.num_inference_steps
    guidance_low, _, guidance_high = limits.guidance_scale
    if not steps_low <= steps <= steps_high:
        raise RequestError("num_inference_steps", f"{steps} is out of range", [f"{steps_low} to {steps_high}"])
    if not guidance_low <= guidance <= guidance_high:  # also refuses nan
        allowed = [f"{guidance_low:g} to {guidance_high:g}"]
        raise RequestError("guidance_scale", f"{guidance} is out of range", allowed)


def _check_source(manifest: Manifest, num_frames: int, sampler: str, prefix_frames: int, strength: float) -> None:
    """Refuse what needs given frames and cannot be had."""
    if prefix_frames and not manifest.limits.clean_prefixes:
        raise RequestError("prefix_frames", no_clean_prefixes(manifest), [0])
    if not 0 <= prefix_frames < num_frames:
        problem = f"{prefix_frames} given frames of a clip of {num_frames} leave nothing to make"
        raise RequestError("prefix_frames", problem, [f"0 to {num_frames - 1}"])
    if not 0 < strength <= 1:  # also refuses nan
        raise RequestError("strength", f"{strength} is out of range", ["above 0, to 1"])
    if strength < 1 and prefix_frames:
        raise RequestError("strength", "an edit has no prefix of given frames", [1])
    if strength < 1 and sampler not in SAMPLERS_OF["velocity"]:
        raise RequestError("sampler", f"edits cannot be sampled with {sampler}", SAMPLERS_OF["velocity"])


def no_clean_prefixes(manifest: Manifest) -> str:
    """Why a checkpoint cannot go on from given frames."""
    return (
        f"{manifest.name} was trained without clean prefixes (limits.clean_prefixes of its manifest is false) and "
        "cannot go on from given frames"
    )


def _size_names(sizes: Sequence[tuple[int, int]]) -> list[str]:
    return [f"{width}x{height}" for width, height in sizes]
