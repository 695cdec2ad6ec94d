"""CSV and JSON-lines manifests: one row a clip. The house's own ``clips.csv`` is one of them."""

from pathlib import Path

from training.errors import DataError
from training.prepare.config import PrepareConfig
from training.prepare.layouts.table import read_table, rows_to_items
from training.prepare.source import Listing

__all__ = ["is_manifest", "list_manifest"]

SUFFIXES = (".csv", ".jsonl", ".ndjson", ".tsv")
USUAL_NAMES = ("clips.csv", "manifest.csv", "manifest.jsonl")


def is_manifest(source: Path) -> bool:
    """Whether the source is a table, or a folder with one under a usual name."""
    return _table_of(source) is not None


def _table_of(source: Path) -> Path | None:
    if source.is_file():
        return source if source.suffix.lower() in SUFFIXES else None
    return next((source / name for name in USUAL_NAMES if (source / name).is_file()), None)


def list_manifest(source: Path, config: PrepareConfig) -> Listing:
    """Clips of a table; the files lie beside it.

    Columns: the file (``file``, ``file_name``, ``path``, ...), and where they are wanted ``label`` or any others named
    by ``label_columns``, ``split``, ``group`` or ``patient``, ``fps``, ``start_frame`` and ``end_frame`` (inclusive),
    ``cuts``, ``dataset``, ``licence``, ``source``, ``attribution``.
    """
    table = _table_of(source)
    if table is None:
        raise DataError(f"{source} is no manifest, and holds none called {', '.join(USUAL_NAMES)}")
    rows = read_table(table)
    items, skipped, notes = rows_to_items(rows, table.parent, config)
    named = rows[0].values.get("dataset", "") if rows else ""
    return Listing(
        layout="manifest",
        dataset=config.dataset or named or table.resolve().parent.name,
        items=tuple(items),
        skipped=tuple(skipped),
        notes=tuple(notes),
    )
