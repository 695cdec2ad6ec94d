"""What a source holds, before anything is decoded: items (a video, a folder of frames, a DICOM file) and segments.

An item is decoded once, front to back; its segments become clips of the cache. Torch-free.
"""

from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "FRAME_SUFFIXES",
    "UNLABELLED",
    "VIDEO_SUFFIXES",
    "Item",
    "Listing",
    "Segment",
    "Skipped",
]

VIDEO_SUFFIXES = frozenset((".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"))
FRAME_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
UNLABELLED = "unlabelled"
"""Condition of clips that have none."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Something that is not in the cache, and why."""

    name: str
    """As on disk, relative to the source."""
    reason: str
    count: int = 1
    """Clips or frames; an unreadable file counts as one."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of an item that becomes a clip."""

    first: int = 0
    """Number of the first frame."""
    last: int | None = None
    """Number of the last frame; None: to the end."""
    conditions: dict[str, str] = field(default_factory=dict)
    cuts: tuple[int, ...] = ()
    """Frame numbers at which a scene begins, as the source says."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that is decoded front to back."""

    name: str
    """Unique, relative to the source, with slashes."""
    kind: str
    """``video``, ``frames`` or ``dicom``."""
    paths: tuple[Path, ...]
    """The file, or the frames in order."""
    numbers: tuple[int, ...] = ()
    """Frame number of each path of ``frames``; a gap is a cut."""
    segments: tuple[Segment, ...] = (Segment(),)
    """In order, not overlapping."""
    group: str
    """Patient or source; never on both sides of a split."""
    split: str | None = None
    """``train``, ``validation`` or ``test`` where the source says so."""
    fps: float | None = None
    """Where the source says it and the file does not."""
    shown_name: str = ""
    """Name in the cache where the one on disk might name a patient."""
    licence: str = ""
    source: str = ""
    attribution: str = ""

    @property
    def cache_name(self) -> str:
        """Name that goes into the cache."""
        return self.shown_name or self.name


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a layout found."""

    layout: str
    dataset: str
    items: tuple[Item, ...]
    skipped: tuple[Skipped, ...] = ()
    ignored: tuple[str, ...] = ()
    """Files that are no part of the data, e.g. a README."""
    notes: tuple[str, ...] = ()
    """Decisions that a reader of the report should know."""
    modality: str = ""
    removed_tags: dict[str, int] = field(default_factory=dict)
    """DICOM elements that do not go into the cache, with the number of files that have them."""
