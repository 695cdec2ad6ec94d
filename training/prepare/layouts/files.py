"""Walking a source in a fixed order, and telling videos, frame folders and other files apart."""

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training.prepare.source import FRAME_SUFFIXES, VIDEO_SUFFIXES

__all__ = ["Found", "frame_numbers", "natural_key", "relative_name", "walk"]


@dataclass(frozen=True)
class Found:
    """A video file, a folder with frames, or another file."""

    kind: str
    """``video``, ``frames`` or ``other``."""
    path: Path
    frames: tuple[Path, ...] = ()


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts ``frame10`` after ``frame9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def relative_name(path: Path, root: Path) -> str:
    """Path below the source, with slashes."""
    return path.relative_to(root).as_posix()


def walk(root: Path) -> Iterator[Found]:
    """Everything below a folder, in natural order; hidden files and folders are passed over."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_key)
        here = Path(folder)
        names = sorted((name for name in files if not name.startswith(".")), key=natural_key)
        frames = [here / name for name in names if Path(name).suffix.lower() in FRAME_SUFFIXES]
        # one picture beside videos is a preview; a folder of pictures is a clip
        if len(frames) > 1:
            yield Found("frames", here, tuple(frames))
            names = [name for name in names if here / name not in set(frames)]
        for name in names:
            kind = "video" if Path(name).suffix.lower() in VIDEO_SUFFIXES else "other"
            yield Found(kind, here / name)


def frame_numbers(paths: tuple[Path, ...]) -> tuple[int, ...]:
    """Number of each frame from its name, so that a missing one is noticed.

    Numbers that rise by the same step (every third frame was extracted) count as consecutive. Names without a
    number, or with numbers that do not rise, are numbered as they come.
    """
    found = [re.findall(r"\d+", path.stem) for path in paths]
    if not all(found):
        return tuple(range(len(paths)))
    numbers = [int(parts[-1]) for parts in found]
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    if not steps or min(steps) < 1:
        return tuple(range(len(paths)))
    unit = min(steps)
    if any(step % unit for step in steps):
        unit = 1
    return tuple((number - numbers[0]) // unit for number in numbers)
