"""Which clips train and which test: by group, so that no patient or source is on both sides. Torch-free."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from training.errors import DataError
from training.prepare.config import PrepareConfig

__all__ = ["Candidate", "Plan", "plan_splits"]

SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What the split needs to know of a clip."""

    name: str
    group: str
    frames: int
    condition: tuple[tuple[str, str], ...]
    given_split: str | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A decision for every clip."""

    splits: tuple[str | None, ...]
    """``train`` or ``test``; None: left out."""
    reasons: dict[int, str]
    """Why clips are left out."""
    notes: tuple[str, ...]
    """Other decisions."""
    is_drawn: bool


def plan_splits(candidates: Sequence[Candidate], duplicates: Sequence[tuple[int, int]], config: PrepareConfig) -> Plan:
    """Put every clip on one side.

    Args:
        duplicates: Pairs of indices of clips of different groups that show the same.

    Raises:
        DataError: The source has no split where ``splits=given`` asks for one, or has duplicates on both sides where
            ``duplicates=fail``.
    """
    notes: list[str] = []
    has_given = [candidate.given_split is not None for candidate in candidates]
    if config.splits == "given" and not all(has_given):
        missing = [candidate.name for candidate, given in zip(candidates, has_given, strict=True) if not given]
        raise DataError(f"splits=given, but the source says no split for {len(missing)} clips, e.g. {missing[0]}")
    if config.splits == "auto" and any(has_given) and not all(has_given):
        missing = [candidate.name for candidate, given in zip(candidates, has_given, strict=True) if not given]
        raise DataError(
            f"the source says a split for some clips and none for {len(missing)} others, e.g. {missing[0]}: "
            "complete it, or choose --splits draw"
        )
    is_drawn = config.splits == "draw" or not any(has_given)
    if is_drawn:
        units = _units(candidates, duplicates if config.duplicates == "move" else ())
        if config.duplicates == "move" and duplicates:
            notes.append(
                f"{len(duplicates)} pairs of near-duplicates: their groups were put on one side before drawing"
            )
        splits, drawn_notes = _draw(candidates, units, config)
        notes += drawn_notes
    else:
        splits, given_notes = _given(candidates, config)
        notes += given_notes
    reasons: dict[int, str] = {
        index: "is of the source's validation split, and validation=skip"
        for index, split in enumerate(splits)
        if split is None
    }
    crossing = [(one, two) for one, two in duplicates if splits[one] and splits[two] and splits[one] != splits[two]]
    if crossing and config.duplicates == "fail":
        one, two = crossing[0]
        raise DataError(
            f"{len(crossing)} pairs of near-duplicates are on both sides, e.g. {candidates[one].name} and "
            f"{candidates[two].name}: choose --duplicates move, drop or keep"
        )
    if config.duplicates == "drop":
        for one, two in crossing:
            here, there = (one, two) if splits[one] == "train" else (two, one)
            splits[here] = None
            reasons[here] = f"shows the same as {candidates[there].name} of the test split"
    elif config.duplicates == "move" and crossing:
        splits = _moved(candidates, splits, crossing, notes)
    elif config.duplicates == "keep" and crossing:
        notes.append(f"{len(crossing)} pairs of near-duplicates are on both sides, and stay there (duplicates=keep)")
    return Plan(splits=tuple(splits), reasons=reasons, notes=tuple(notes), is_drawn=is_drawn)


def _given(candidates: Sequence[Candidate], config: PrepareConfig) -> tuple[list[str | None], list[str]]:
    """The source's split, with groups that are on both sides put where most of their frames are."""
    notes = []
    names = {candidate.given_split for candidate in candidates}
    validation = config.validation
    if "validation" in names:
        if validation == "auto":
            validation = "train" if "test" in names else "test"
        notes.append(
            f"the source's validation split is {'left out' if validation == 'skip' else 'part of ' + validation}"
        )
    splits = [
        (None if validation == "skip" else validation)
        if candidate.given_split == "validation"
        else candidate.given_split
        for candidate in candidates
    ]
    frames: dict[str, Counter[str]] = defaultdict(Counter)
    for candidate, split in zip(candidates, splits, strict=True):
        if split is not None:
            frames[candidate.group][split] += candidate.frames
    for group, counts in sorted(frames.items()):
        if len(counts) > 1:
            side = "train" if counts["train"] >= counts["test"] else "test"
            notes.append(
                f"group {group} is on both sides of the source's split ({counts['train']} frames train, "
                f"{counts['test']} test): all of it went to {side}"
            )
            splits = [
                side if split is not None and candidate.group == group else split
                for candidate, split in zip(candidates, splits, strict=True)
            ]
    return splits, notes


def _moved(
    candidates: Sequence[Candidate], splits: list[str | None], crossing: Sequence[tuple[int, int]], notes: list[str]
) -> list[str | None]:
    """Put every unit of groups that share footage on one side: train, so that the test split holds nothing seen."""
    units = _units(candidates, crossing)
    touched = {units[candidates[index].group] for pair in crossing for index in pair}
    moved = sorted(
        candidate.group
        for candidate, split in zip(candidates, splits, strict=True)
        if split == "test" and units[candidate.group] in touched
    )
    notes.append(
        f"{len(crossing)} pairs of near-duplicates were on both sides: moved to train: group "
        + ", ".join(dict.fromkeys(moved))
    )
    return [
        "train" if split == "test" and units[candidate.group] in touched else split
        for candidate, split in zip(candidates, splits, strict=True)
    ]


def _units(candidates: Sequence[Candidate], duplicates: Sequence[tuple[int, int]]) -> dict[str, str]:
    """The unit of each group: groups joined by a duplicate are one, named after the first of them."""
    parent = {candidate.group: candidate.group for candidate in candidates}

    def root(group: str) -> str:
        while parent[group] != group:
            group = parent[group]
        return group

    for one, two in duplicates:
        first, second = sorted((root(candidates[one].group), root(candidates[two].group)))
        parent[second] = first
    return {group: root(group) for group in parent}


def _draw(
    candidates: Sequence[Candidate], units: dict[str, str], config: PrepareConfig
) -> tuple[list[str | None], list[str]]:
    """Draw units into the test split until every label has its share there; each label stays in train."""
    frames: dict[str, Counter[tuple[tuple[str, str], ...]]] = defaultdict(Counter)
    total: Counter[tuple[tuple[str, str], ...]] = Counter()
    for candidate in candidates:
        frames[units[candidate.group]][candidate.condition] += candidate.frames
        total[candidate.condition] += candidate.frames

    def rank(unit: str) -> str:
        return hashlib.sha256(f"{config.seed}:{unit}".encode()).hexdigest()

    test: set[str] = set()
    tested: Counter[tuple[tuple[str, str], ...]] = Counter()
    for unit in sorted(frames, key=rank):
        counts = frames[unit]
        is_needed = any(tested[label] < config.test_fraction * total[label] for label in counts)
        # no more than half of a label, and never all of it: what is not trained cannot be tested
        is_affordable = all(
            tested[label] + count <= max(0.5, config.test_fraction) * total[label] for label, count in counts.items()
        )
        if is_needed and is_affordable:
            test.add(unit)
            tested.update(counts)
    notes = []
    untested = sorted("/".join(value for _, value in label) for label in total if not tested[label])
    if untested:
        notes.append(
            f"{len(untested)} labels have too few groups for the test split, and are in train alone: "
            + ", ".join(untested[:10])
            + (", ..." if len(untested) > 10 else "")
        )
    splits: list[str | None] = ["test" if units[candidate.group] in test else "train" for candidate in candidates]
    return splits, notes
