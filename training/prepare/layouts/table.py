"""Rows of a CSV or JSON-lines table, and what its columns mean: shared by manifests and VideoFolder."""

import csv
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import DataError
from training.prepare.config import PrepareConfig
from training.prepare.layouts.files import Found, frame_numbers, natural_key
from training.prepare.layouts.folder import name_columns
from training.prepare.source import FRAME_SUFFIXES, VIDEO_SUFFIXES, Item, Segment, Skipped

__all__ = ["FILE_COLUMNS", "Row", "read_table", "rows_to_items"]

FILE_COLUMNS = ("file", "file_name", "filename", "path", "video", "video_path")
GROUP_COLUMNS = ("group", "patient", "patient_id", "subject", "subject_id", "case", "case_id", "video_id")
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
META_COLUMNS = frozenset((
    *FILE_COLUMNS, *GROUP_COLUMNS, "attribution", "cuts", "dataset", "end_frame", "fps", "frames", "licence", "license",
    "source", "split", "start_frame",
))  # fmt: skip
USUAL_LABELS = ("label", "class", "class_name", "finding", "probe")
MAX_ROWS = 5_000_000


@dataclass(frozen=True)
class Row:
    """A row, and where it stands."""

    where: str
    values: dict[str, str]


def read_table(path: Path) -> list[Row]:
    """Read a CSV (comma, semicolon or tab) or JSON-lines table.

    Raises:
        DataError: It cannot be read, or a row is damaged; the message names the row.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    rows = _json_rows(path, text) if path.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows(path, text)
    if len(rows) > MAX_ROWS:
        raise DataError(f"{path} has more than {MAX_ROWS} rows")
    return rows


def _csv_rows(path: Path, text: str) -> list[Row]:
    lines = text.splitlines()
    if not lines:
        raise DataError(f"{path} is empty")
    delimiter = max(",;\t", key=lines[0].count)
    try:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        rows = []
        for number, row in enumerate(reader, start=2):
            if None in row or None in row.values():
                raise DataError(f"{path}, row {number}: has another number of values than there are columns")
            rows.append(Row(f"{path.name}, row {number}", {key.strip(): value.strip() for key, value in row.items()}))
    except csv.Error as error:
        raise DataError(f"{path} is no valid CSV: {error}") from error
    return rows


def _json_rows(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: must be an object, not {type(value).__name__}")
        rows.append(Row(f"{path.name}, line {number}", {str(key): _text(item) for key, item in value.items()}))
    return rows


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(_text(item) for item in value)
    return str(value).strip()


def rows_to_items(
    rows: list[Row], folder: Path, config: PrepareConfig, *, split: str | None = None, prefix: str = ""
) -> tuple[list[Item], list[Skipped], list[str]]:
    """Items of a table's rows.

    Args:
        folder: Where the files lie.
        split: Of all rows, where the folder says it.
        prefix: Before every name, to keep those of several tables apart.

    Returns:
        Items, rows whose file is not there, and notes.

    Raises:
        DataError: A column is missing or a value is bad; the message names row and column.
    """
    if not rows:
        return [], [], []
    columns = tuple(rows[0].values)
    file_column = next((name for name in FILE_COLUMNS if name in columns), None)
    if file_column is None:
        raise DataError(f"{rows[0].where}: no column names the file; one of {', '.join(FILE_COLUMNS)} is needed")
    rows = _of_data_set(rows, config)
    labels = _label_columns(rows, columns, config)
    items: dict[str, Item] = {}
    skipped = []
    unused = [name for name in columns if name not in META_COLUMNS and name not in labels]
    for row in rows:
        item, problem = _item(row, file_column, labels, folder, config, split, prefix)
        if problem is not None:
            skipped.append(problem)
        elif item is not None:
            if item.name in items:
                item = _joined(items[item.name], item, row)
            items[item.name] = item
    notes = [f"columns that are not used: {', '.join(unused)} (label_columns makes them conditions)"] if unused else []
    return list(items.values()), skipped, notes


def _of_data_set(rows: list[Row], config: PrepareConfig) -> list[Row]:
    if "dataset" not in rows[0].values:
        return rows
    names = sorted({row.values["dataset"] for row in rows})
    if len(names) == 1 and config.dataset in ("", names[0]):
        return rows
    if config.dataset not in names:
        raise DataError(f"the table holds the data sets {', '.join(names)}: choose one with --dataset")
    return [row for row in rows if row.values["dataset"] == config.dataset]


def _label_columns(rows: list[Row], columns: tuple[str, ...], config: PrepareConfig) -> tuple[str, ...]:
    usual = tuple(name for name in USUAL_LABELS if name in columns and any(row.values.get(name) for row in rows))
    allowed = tuple(name for name in columns if name not in META_COLUMNS)
    return name_columns(config, allowed, usual)


def _item(
    row: Row,
    file_column: str,
    labels: tuple[str, ...],
    folder: Path,
    config: PrepareConfig,
    split: str | None,
    prefix: str,
) -> tuple[Item | None, Skipped | None]:
    values = row.values

    def fail(column: str, problem: str) -> DataError:
        return DataError(f"{row.where}, column {column}: {problem}")

    file = values.get(file_column, "")
    if not file:
        raise fail(file_column, "must not be empty")
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise fail(file_column, f"{file!r} must be a path below the table's folder")
    for name in labels:
        if not values.get(name):
            raise fail(name, "must not be empty: every clip needs a value of every condition")
    name = prefix + Path(file).as_posix()
    path = folder / file
    kind, paths = _media(path)
    if kind is None:
        reason = "is not there" if not path.exists() else "is no video and no folder of frames"
        return None, Skipped(name=name, reason=f"{reason} ({row.where})")
    given = values.get("split", "")
    if given and given.lower() not in SPLIT_NAMES:
        raise fail("split", f"{given!r} is none of {', '.join(SPLIT_NAMES)}")
    fps = _number(values, "fps", fail)
    if fps is not None and not 0 < fps < 1000:
        raise fail("fps", f"must be above 0 and below 1000, not {fps:g}")
    if kind == "frames" and fps is None and config.fps is None:
        raise fail(file_column, f"{file!r} is a folder of frames: give its frame rate in a column fps, or with --fps")
    first, last = _number(values, "start_frame", fail), _number(values, "end_frame", fail)
    if first is not None and last is not None and last < first:
        raise fail("end_frame", f"{last:g} is before start_frame {first:g}")
    group = next((values[column] for column in GROUP_COLUMNS if values.get(column)), name)
    return Item(
        name=name,
        kind=kind,
        paths=paths,
        numbers=frame_numbers(paths) if kind == "frames" else (),
        segments=(
            Segment(
                first=int(first or 0),
                last=None if last is None else int(last),
                conditions={column: values[column] for column in labels},
                cuts=_cuts(values.get("cuts", ""), fail),
            ),
        ),
        group=group,
        split=split or (SPLIT_NAMES[given.lower()] if given else None),
        fps=fps,
        licence=values.get("licence") or values.get("license") or config.licence,
        source=values.get("source") or config.source,
        attribution=values.get("attribution") or config.attribution,
    ), None


def _media(path: Path) -> tuple[str | None, tuple[Path, ...]]:
    if path.is_dir():
        frames = [entry for entry in path.iterdir() if entry.suffix.lower() in FRAME_SUFFIXES]
        frames.sort(key=lambda entry: natural_key(entry.name))
        return Found("frames", path).kind if frames else None, tuple(frames)
    is_video = path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES
    return ("video", (path,)) if is_video else (None, ())


def _number(values: dict[str, str], column: str, fail: Any) -> float | None:
    text = values.get(column, "")
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        raise fail(column, f"{text!r} is no number") from None
    if column != "fps" and (number < 0 or number != int(number)):
        raise fail(column, f"{text!r} is no frame number (0, 1, ...)")
    return number


def _cuts(text: str, fail: Any) -> tuple[int, ...]:
    try:
        cuts = tuple(int(part) for part in text.split())
    except ValueError:
        raise fail("cuts", f"{text!r} must be frame numbers separated by blanks") from None
    if any(cut < 1 for cut in cuts) or list(cuts) != sorted(set(cuts)):
        raise fail("cuts", f"{text!r} must rise and be at least 1")
    return cuts


def _joined(known: Item, item: Item, row: Row) -> Item:
    """One item of two rows that take different stretches of one file."""
    segments = sorted((*known.segments, *item.segments), key=lambda segment: segment.first)
    for before, after in itertools.pairwise(segments):
        if before.last is None or before.last >= after.first:
            raise DataError(f"{row.where}: {item.name!r} is listed twice, with stretches that overlap")
    if (known.group, known.split) != (item.group, item.split):
        raise DataError(f"{row.where}: {item.name!r} is listed twice, with different group or split")
    return Item(**{**vars(known), "segments": tuple(segments)})
