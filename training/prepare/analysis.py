"""The first pass: every frame is looked at once, nothing is kept but what the plan and the report need. Torch-free."""

import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from training.errors import DataError
from training.prepare.borders import BorderFinder
from training.prepare.config import Box, PrepareConfig
from training.prepare.cuts import CutDetector, small_grey
from training.prepare.duplicates import Signature, signature_of
from training.prepare.frames import Dropped, frame_step, kept_frames
from training.prepare.overlay import OverlayFinder
from training.prepare.sampling import EvenSampler
from training.prepare.source import UNLABELLED, Item, Skipped

__all__ = ["ClipDraft", "ItemAnalysis", "analyse_item"]

SIGNATURE_FRAMES = 64
LOOKED_AT = 96
"""Frames of an item at which borders and overlays are looked for."""
THUMBNAILS, THUMBNAIL_SIDE = 6, 160


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipDraft:
    """A clip that could go into the cache."""

    name: str
    item: int
    """Index of its item in the listing."""
    segment: int
    frames: int
    fps: float
    cuts: tuple[int, ...]
    conditions: dict[str, str]
    group: str
    given_split: str | None
    signature: Signature


@dataclass(frozen=True, kw_only=True, eq=False)
class ItemAnalysis:
    """What the first pass found out about an item."""

    item: int
    width: int = 0
    """Pixels, after the configured crop."""
    height: int = 0
    clips: tuple[ClipDraft, ...] = ()
    picture: Box | None = None
    """Inside of black borders, if there are any."""
    overlays: tuple[Box, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    black_frames: int = 0
    decoded_frames: int = 0
    thumbnails: tuple[bytes, ...] = ()
    """JPEG, evenly spaced."""


@dataclass
class _Clip:
    """A clip while its frames come in."""

    frames: int = 0
    marks: list[int] = field(default_factory=list)
    detector: CutDetector = field(default_factory=CutDetector)
    greys: EvenSampler[np.ndarray] = field(default_factory=lambda: EvenSampler[np.ndarray](SIGNATURE_FRAMES))


def analyse_item(index: int, item: Item, config: PrepareConfig) -> ItemAnalysis:
    """Decode an item and describe its clips. What is wrong with it is in ``skipped``; nothing is raised.

    Args:
        index: Of the item in its listing.
    """
    skipped: list[Skipped] = []
    dropped = Dropped()
    clips = {number: _Clip() for number in range(len(item.segments))}
    borders, overlay = BorderFinder(), OverlayFinder()
    looked_at = EvenSampler[None](LOOKED_AT)
    thumbnails = EvenSampler[bytes](2 * THUMBNAILS)
    fps: float | None = None
    size = (0, 0)
    decoded = 0
    try:
        for kept in kept_frames(
            item, config, lambda name, reason: skipped.append(Skipped(name=name, reason=reason)), dropped
        ):
            pixels, clip = kept.frame.pixels, clips[kept.segment]
            fps, size = kept.frame.fps, pixels.shape[:2]
            grey = small_grey(pixels)
            clip.detector.add(grey)
            if clip.greys.wants(clip.frames):
                clip.greys.add(clip.frames, grey)
            if kept.is_scene_start:
                clip.marks.append(clip.frames)
            if looked_at.wants(decoded):
                looked_at.add(decoded, None)
                borders.add(pixels)
                overlay.add(pixels)
            if thumbnails.wants(decoded):
                thumbnails.add(decoded, _thumbnail(pixels))
            clip.frames += 1
            decoded += 1
    except DataError as error:
        return ItemAnalysis(item=index, skipped=(Skipped(name=item.name, reason=str(error)),))
    rate = item.fps or fps or config.fps
    if decoded and rate is None:
        reason = "does not say its frame rate: give it with --fps"
        return ItemAnalysis(item=index, skipped=(Skipped(name=item.name, reason=reason),))
    drafts = []
    for number, clip in clips.items():
        name = _clip_name(item, number)
        if clip.frames < config.min_frames:
            reason = f"has {clip.frames} frames that can be used, fewer than min_frames={config.min_frames}"
            if dropped.black:
                reason += f" ({dropped.black} of the item's are black)"
            skipped.append(Skipped(name=_clip_name(item, number, is_shown=False), reason=reason))
            continue
        assert rate is not None  # there are frames
        marks = set(clip.marks)
        if config.cuts in ("detect", "both"):
            marks.update(clip.detector.cuts())
        drafts.append(
            ClipDraft(
                name=name,
                item=index,
                segment=number,
                frames=clip.frames,
                fps=round(rate / frame_step(rate, config.max_fps), 6),
                cuts=tuple(sorted(marks)),
                conditions=item.segments[number].conditions or {"label": UNLABELLED},
                group=item.group,
                given_split=item.split,
                signature=signature_of(clip.greys.values),
            )
        )
    overlays = overlay.boxes()
    return ItemAnalysis(
        item=index,
        width=size[1],
        height=size[0],
        clips=tuple(drafts),
        picture=borders.picture(overlays),
        overlays=tuple(overlays),
        skipped=tuple(skipped),
        black_frames=dropped.black,
        decoded_frames=decoded,
        thumbnails=tuple(thumbnails.values[:: max(1, len(thumbnails.values) // THUMBNAILS)][:THUMBNAILS]),
    )


def _clip_name(item: Item, number: int, *, is_shown: bool = True) -> str:
    name = item.cache_name if is_shown else item.name
    segment = item.segments[number]
    if segment.first == 0 and segment.last is None:
        return name
    return f"{name}#{segment.first}-{'' if segment.last is None else segment.last}"


def _thumbnail(pixels: np.ndarray) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()
