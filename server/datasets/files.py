"""Where the files of clips lie: ``<dataset>/<two digits>/<job>.<attempt>`` below one folder."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from medsora.files import sync
from server.datasets.model import is_dataset_id

__all__ = ["DatasetFiles"]

T = TypeVar("T")


class DatasetFiles:
    """Files of clips of datasets. Each appears whole or not at all, and is never changed.

    Args:
        root: Made when the first file is written.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, dataset_id: str, job_id: str, attempt: int) -> Path:
        """Where the file of an attempt is, or would be."""
        return self._root / dataset_id / job_id[6:8] / f"{job_id}.{attempt}"

    def write(self, dataset_id: str, job_id: str, attempt: int, write: Callable[[Path], T]) -> T:
        """Let ``write`` write a file, bring it to the disk, and give it its name; returns what ``write`` did.

        Raises:
            OSError: There is no room, or no right to write.
        """
        path = self.path(dataset_id, job_id, attempt)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.part")
        try:
            result = write(partial)
            sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return result

    def remove(self, dataset_id: str, job_id: str, attempt: int) -> None:
        """Remove the file of an attempt, if it is there."""
        self.path(dataset_id, job_id, attempt).unlink(missing_ok=True)

    def remove_all(self, dataset_id: str) -> None:
        """Remove all files of a dataset."""
        shutil.rmtree(self._root / dataset_id, ignore_errors=True)

    def datasets(self) -> list[str]:
        """Ids of the datasets that have files."""
        if not self._root.is_dir():
            return []
        return sorted(path.name for path in self._root.iterdir() if is_dataset_id(path.name))

    def files(self, dataset_id: str) -> Iterator[Path]:
        """All files of a dataset."""
        root = self._root / dataset_id
        return (path for path in root.glob("??/*") if path.is_file()) if root.is_dir() else iter(())
