"""A finished folder takes the place of an older one. Torch-free."""

import shutil
from pathlib import Path

from medsora.files import sync

__all__ = ["put_in_place"]


def put_in_place(finished: Path, target: Path) -> None:
    """Rename a finished folder to its place; an older one there is removed once the new one stands."""
    sync(finished)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.replace(old)
    finished.replace(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
