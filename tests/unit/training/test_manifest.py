"""The clip table: what is read, and that every mistake is named with its place."""

import csv
from pathlib import Path

import pytest

from training.data.manifest import COLUMNS, condition_indices, read_clip_table, select_clips
from training.errors import DataError

GOOD = {
    "file": "a.mp4", "dataset": "lung", "label": "covid", "probe": "convex", "split": "train", "group": "p1",
    "frames": "100", "fps": "25.0", "cuts": "10 40", "licence": "CC BY 4.0", "source": "s", "attribution": "x",
}  # fmt: skip


def write(path: Path, rows: list[dict[str, str]], columns: tuple[str, ...] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_row_is_read_with_its_types(tmp_path: Path) -> None:
    (record,) = read_clip_table(write(tmp_path / "c.csv", [GOOD], tuple(reversed(COLUMNS))))
    assert (record.frames, record.fps, record.cuts, record.label) == (100, 25.0, (10, 40), "covid")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("frames", "many"), ("frames", "0"), ("fps", "fast"), ("fps", "0"), ("fps", "nan"), ("split", "validation"),
        ("cuts", "1,2"), ("cuts", "40 10"), ("cuts", "100"), ("cuts", "0"), ("file", ""), ("file", "../a.mp4"),
        ("file", "/etc/a.mp4"), ("group", " "), ("licence", ""),
    ],
)  # fmt: skip
def test_a_bad_value_names_file_row_and_column(tmp_path: Path, column: str, value: str) -> None:
    path = write(tmp_path / "c.csv", [GOOD, GOOD | {"file": "b.mp4", column: value}])
    with pytest.raises(DataError, match=f"c.csv, row 3, column {column}: "):
        read_clip_table(path)


def test_wrong_columns_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", [GOOD], tuple(name for name in COLUMNS if name != "fps"))
    with pytest.raises(DataError, match="missing: fps"):
        read_clip_table(path)


def test_a_short_row_and_a_missing_file(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", [GOOD])
    path.write_text(path.read_text(encoding="utf-8") + "b.mp4,lung\n", encoding="utf-8")
    with pytest.raises(DataError, match="row 3, column label: the row ends before"):
        read_clip_table(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_clip_table(tmp_path / "none.csv")


def test_a_group_on_both_sides_and_a_file_twice_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", [GOOD, GOOD | {"file": "b.mp4", "split": "test"}])
    with pytest.raises(DataError, match=r"row 3, column split: group 'p1' is also in split 'train'"):
        read_clip_table(path)
    with pytest.raises(DataError, match=r"row 3, column file: 'a.mp4' is listed twice"):
        read_clip_table(write(tmp_path / "d.csv", [GOOD, GOOD]))


def test_selection_keeps_the_asked_split_and_classes(tmp_path: Path) -> None:
    rows = [
        GOOD,
        GOOD | {"file": "b.mp4", "label": "uncertain"},
        GOOD | {"file": "c.mp4", "split": "test", "group": "p2"},
        GOOD | {"file": "d.mp4", "dataset": "laparoscopy"},
    ]
    records = read_clip_table(write(tmp_path / "c.csv", rows))
    chosen = select_clips(records, dataset="lung", split="train", excluded_labels=("uncertain",))
    assert [record.file for record in chosen] == ["a.mp4"]
    with pytest.raises(DataError, match="laparoscopy, lung"):
        select_clips(records, dataset="heart", split="train")


def test_conditions_follow_the_vocabulary(tmp_path: Path) -> None:
    (record,) = read_clip_table(write(tmp_path / "c.csv", [GOOD]))
    names = (("regular", "covid"), ("convex", "linear"))
    assert condition_indices(record, columns=("label", "probe"), names=names) == (1, 0)
    with pytest.raises(DataError, match="column label is 'covid'"):
        condition_indices(record, columns=("label",), names=(("regular",),))


def test_a_folder_is_told_to_be_prepared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder and no prepared cache: make one of it with medsora-train prepare"):
        read_clip_table(tmp_path)
