"""Runs of equal frame labels: how data sets that label frames become clips with one label each. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from training.prepare.source import Segment, Skipped

__all__ = ["FrameLabel", "label_runs", "runs_to_segments"]


@dataclass(frozen=True)
class FrameLabel:
    """Conditions of one frame."""

    number: int
    conditions: tuple[tuple[str, str], ...]
    """Pairs of name and value."""


def label_runs(labels: Sequence[FrameLabel], *, bridge_frames: int = 0) -> list[list[FrameLabel]]:
    """Split frames into runs of equal conditions and consecutive numbers.

    Args:
        labels: With rising numbers.
        bridge_frames: A run shorter than this takes the conditions of the run before it, when no number is
            missing between them; annotators' flicker then does not end a clip.
    """
    runs: list[list[FrameLabel]] = []
    keyed = enumerate(labels)
    for _, members in groupby(keyed, key=lambda pair: (pair[1].number - pair[0], pair[1].conditions)):
        run = [label for _, label in members]
        before = runs[-1] if runs else None
        is_next = before is not None and before[-1].number + 1 == run[0].number
        if before is not None and is_next and len(run) < bridge_frames:
            run = [FrameLabel(label.number, before[0].conditions) for label in run]
        if before is not None and is_next and before[0].conditions == run[0].conditions:
            before.extend(run)
        else:
            runs.append(run)
    return runs


def runs_to_segments(
    name: str, labels: Sequence[FrameLabel], *, min_frames: int, bridge_frames: int
) -> tuple[tuple[Segment, ...], tuple[Skipped, ...]]:
    """Segments of the runs that are long enough, and one entry that counts the others.

    Args:
        name: Of the item, for the entry.
    """
    segments: list[Segment] = []
    short: list[int] = []
    for run in label_runs(labels, bridge_frames=bridge_frames):
        if len(run) < min_frames:
            short.append(len(run))
        else:
            segments.append(Segment(first=run[0].number, last=run[-1].number, conditions=dict(run[0].conditions)))
    skipped: tuple[Skipped, ...] = ()
    if short:
        reason = (
            f"{len(short)} runs of one label with {sum(short)} frames together are shorter than min_frames={min_frames}"
        )
        skipped = (Skipped(name=name, reason=reason, count=len(short)),)
    return tuple(segments), skipped
