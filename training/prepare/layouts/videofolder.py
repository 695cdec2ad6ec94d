"""Hugging Face's VideoFolder: splits and labels as folders, or a metadata file with a column ``file_name``.

Source: huggingface.co/docs/datasets, "Create a video dataset"; names of splits as its repository-structure page
lists them.
"""

from pathlib import Path

from training.errors import DataError
from training.prepare.config import PrepareConfig
from training.prepare.layouts.files import relative_name, walk
from training.prepare.layouts.folder import item_of, name_columns
from training.prepare.layouts.table import SPLIT_NAMES, Row, read_table, rows_to_items
from training.prepare.source import Item, Listing, Skipped

__all__ = ["is_videofolder", "list_videofolder"]

METADATA = ("metadata.csv", "metadata.jsonl")


def is_videofolder(root: Path) -> bool:
    """Whether a folder has metadata with ``file_name``, or folders called like splits and no files beside them."""
    if not root.is_dir():
        return False
    if any(_has_file_name(path) for path in _metadata_files(root)):
        return True
    return bool(_split_folders(root))


def _split_folders(root: Path) -> dict[str, Path]:
    """Folders that are splits, if all folders are (``data`` may stand above them)."""
    for top in (root, root / "data"):
        if not top.is_dir():
            continue
        folders = [path for path in sorted(top.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        if folders and all(path.name.lower() in SPLIT_NAMES for path in folders):
            return {SPLIT_NAMES[path.name.lower()]: path for path in folders}
    return {}


def _metadata_files(root: Path) -> list[Path]:
    folders = [root, *_split_folders(root).values()]
    return [folder / name for folder in folders for name in METADATA if (folder / name).is_file()]


def _has_file_name(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return "file_name" in file.readline(100_000)
    except (OSError, UnicodeDecodeError):
        return False


def list_videofolder(root: Path, config: PrepareConfig) -> Listing:
    """Clips of all splits.

    Raises:
        DataError: Metadata without ``file_name``, or none and no folders called like splits.
    """
    splits = _split_folders(root)
    tables = _metadata_files(root)
    if tables:
        return _from_metadata(root, tables, splits, config)
    if not splits:
        raise DataError(f"{root} has neither {' nor '.join(METADATA)} nor folders called {', '.join(SPLIT_NAMES)}")
    columns = name_columns(config, ("label",), ("label",))
    items: list[Item] = []
    ignored: list[str] = []
    for split, folder in splits.items():
        for found in walk(folder):
            if found.kind == "other":
                ignored.append(relative_name(found.path, root))
                continue
            label = found.path.relative_to(folder).parent.as_posix()
            conditions = {"label": label} if columns and label != "." else {}
            items.append(item_of(found, root, config, conditions=conditions, split=split))
    folders = [item for item in items if item.kind == "frames"]
    if folders and config.fps is None:
        raise DataError(f"frame folders, e.g. {folders[0].name}, do not say their frame rate: give it with --fps")
    return _listing(root, items, [], ignored, [], config)


def _from_metadata(root: Path, tables: list[Path], splits: dict[str, Path], config: PrepareConfig) -> Listing:
    names = {folder: split for split, folder in splits.items()}
    items: list[Item] = []
    skipped: list[Skipped] = []
    notes: list[str] = []
    for table in tables:
        rows = [_with_split(row, splits, root) for row in read_table(table)]
        if rows and "file_name" not in rows[0].values:
            raise DataError(f"{table} has no column file_name")
        folder = table.parent
        prefix = "" if folder == root else f"{relative_name(folder, root)}/"
        found, missing, said = rows_to_items(rows, folder, config, split=names.get(folder), prefix=prefix)
        items += found
        skipped += missing
        notes += [f"{relative_name(table, root)}: {note}" for note in said]
    listed = {path for item in items for path in item.paths}
    unlisted = [
        relative_name(found.path, root) for found in walk(root) if found.kind == "video" and found.path not in listed
    ]
    skipped += [Skipped(name=name, reason="is not in the metadata") for name in unlisted]
    return _listing(root, items, skipped, [], list(dict.fromkeys(notes)), config)


def _with_split(row: Row, splits: dict[str, Path], root: Path) -> Row:
    """A row of metadata in the root, with the split of the folder its file lies in."""
    if row.values.get("split") or not row.values.get("file_name"):
        return row
    for split, folder in splits.items():
        if row.values["file_name"].startswith(f"{relative_name(folder, root)}/"):
            return Row(row.where, row.values | {"split": split})
    return row


def _listing(
    root: Path,
    items: list[Item],
    skipped: list[Skipped],
    ignored: list[str],
    notes: list[str],
    config: PrepareConfig,
) -> Listing:
    return Listing(
        layout="videofolder",
        dataset=config.dataset or root.resolve().name,
        items=tuple(items),
        skipped=tuple(skipped),
        ignored=tuple(ignored),
        notes=tuple(notes),
    )
