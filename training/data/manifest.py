"""Reads the table of clips (``clips.csv``): one row a clip, with label, split, cuts and licence.

Torch-free. Decoding is in :mod:`training.data.clips`.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.errors import DataError

__all__ = ["COLUMNS", "ClipRecord", "condition_indices", "read_clip_table", "select_clips"]

COLUMNS = (
    "file", "dataset", "label", "probe", "split", "group", "frames", "fps", "cuts", "licence", "source",
    "attribution",
)  # fmt: skip
SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """One row of the table."""

    file: str
    """Path relative to the table's folder."""
    dataset: str
    label: str
    probe: str
    split: str
    """``train`` or ``test``; a group is never on both sides."""
    group: str
    """Patient or source video."""
    frames: int
    fps: float
    """Frames a second of the file."""
    cuts: tuple[int, ...]
    """Indices of the frames at which a new scene begins."""
    licence: str
    source: str
    attribution: str
    labels: dict[str, str] = field(default_factory=dict)
    """All conditions of a clip of a prepared cache, by name."""

    def value_of(self, column: str) -> str:
        """Value of a condition's column.

        Raises:
            DataError: The clip has no such column.
        """
        if column in self.labels:
            return self.labels[column]
        if self.labels or column not in COLUMNS:
            known = ", ".join(self.labels or COLUMNS)
            raise DataError(f"{self.file}: has no column {column!r}; there are: {known}")
        return str(getattr(self, column))


def read_clip_table(path: Path) -> tuple[ClipRecord, ...]:
    """Read every row of a clip table.

    Args:
        path: CSV file with exactly the columns :data:`COLUMNS`, in any order.

    Raises:
        DataError: Unreadable file, wrong columns, a bad value (names row and column; row 1 is the header),
            a file listed twice, or a group that is in both splits.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder and no prepared cache: make one of it with medsora-train prepare")
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            found = tuple(reader.fieldnames or ())
            if sorted(found) != sorted(COLUMNS):
                raise DataError(
                    f"{path}: columns are {', '.join(found) or '(none)'}; missing: "
                    f"{', '.join(sorted(set(COLUMNS) - set(found))) or 'none'}, unknown: "
                    f"{', '.join(sorted(set(found) - set(COLUMNS))) or 'none'}"
                )
            records = tuple(_read_row(path, number, row) for number, row in enumerate(reader, start=2))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no valid CSV: {error}") from error
    _check_table(path, records)
    return records


def _read_row(path: Path, number: int, row: dict[str, str]) -> ClipRecord:
    def fail(column: str, problem: str) -> DataError:
        return DataError(f"{path}, row {number}, column {column}: {problem}")

    for column in COLUMNS:
        if row[column] is None:
            raise fail(column, "the row ends before this column")
    if None in row:
        raise fail(COLUMNS[-1], "the row has more values than there are columns")
    for column in ("file", "dataset", "label", "group", "licence"):
        if not row[column].strip():
            raise fail(column, "must not be empty")
    if row["split"] not in SPLITS:
        raise fail("split", f"{row['split']!r} is none of {', '.join(SPLITS)}")
    if Path(row["file"]).is_absolute() or ".." in Path(row["file"]).parts:
        raise fail("file", f"{row['file']!r} must be a path below the table's folder")
    try:
        frames = int(row["frames"])
    except ValueError:
        raise fail("frames", f"{row['frames']!r} is no whole number") from None
    try:
        fps = float(row["fps"])
    except ValueError:
        raise fail("fps", f"{row['fps']!r} is no number") from None
    if frames < 1:
        raise fail("frames", f"must be at least 1, not {frames}")
    if not 0 < fps < 1000:
        raise fail("fps", f"must be above 0 and below 1000, not {fps}")
    try:
        cuts = tuple(int(item) for item in row["cuts"].split())
    except ValueError:
        raise fail("cuts", f"{row['cuts']!r} must be frame indices separated by blanks") from None
    if any(not 0 < cut < frames for cut in cuts) or list(cuts) != sorted(set(cuts)):
        raise fail("cuts", f"{row['cuts']!r} must rise and lie between 1 and {frames - 1}")
    return ClipRecord(
        file=row["file"].strip(),
        dataset=row["dataset"].strip(),
        label=row["label"].strip(),
        probe=row["probe"].strip(),
        split=row["split"],
        group=row["group"].strip(),
        frames=frames,
        fps=fps,
        cuts=cuts,
        licence=row["licence"].strip(),
        source=row["source"].strip(),
        attribution=row["attribution"].strip(),
    )


def _check_table(path: Path, records: Sequence[ClipRecord]) -> None:
    files: set[str] = set()
    split_of: dict[tuple[str, str], str] = {}
    for number, record in enumerate(records, start=2):
        if record.file in files:
            raise DataError(f"{path}, row {number}, column file: {record.file!r} is listed twice")
        files.add(record.file)
        known = split_of.setdefault((record.dataset, record.group), record.split)
        if known != record.split:
            raise DataError(f"{path}, row {number}, column split: group {record.group!r} is also in split {known!r}")


def select_clips(
    records: Iterable[ClipRecord], *, dataset: str, split: str, excluded_labels: Sequence[str] = ()
) -> tuple[ClipRecord, ...]:
    """Clips of one data set and split, without the labels that are no class.

    Raises:
        DataError: Nothing is left; the message lists the data sets there are.
    """
    table = tuple(records)
    chosen = tuple(
        record
        for record in table
        if record.dataset == dataset
        and record.split == split
        and not {record.label, *record.labels.values()} & set(excluded_labels)
    )
    if not chosen:
        names = ", ".join(sorted({record.dataset for record in table})) or "(none)"
        raise DataError(f"no clip of data set {dataset!r} in split {split!r}; data sets in the table: {names}")
    return chosen


def condition_indices(record: ClipRecord, *, columns: Sequence[str], names: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """Position of a clip's values in the vocabulary of each condition.

    Args:
        columns: Column of the table that holds each condition, e.g. ``("label", "probe")``.
        names: Vocabulary of each condition, in the order of the network's embedding.

    Raises:
        DataError: A value that is not in its vocabulary.
    """
    indices = []
    for column, vocabulary in zip(columns, names, strict=True):
        value = record.value_of(column)
        if value not in vocabulary:
            raise DataError(f"{record.file}: column {column} is {value!r}, the model knows {', '.join(vocabulary)}")
        indices.append(list(vocabulary).index(value))
    return tuple(indices)
