"""Where the files of clips lie: ``<dataset>/<two digits>/<job>.<attempt>`` among the objects of datasets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from medsora.files import sync
from server.datasets.model import is_dataset_id
from server.objects import LocalObjects, Objects

__all__ = ["DatasetFiles", "FoundClip"]

T = TypeVar("T")


@dataclass(frozen=True)
class FoundClip:
    """The file of an attempt, or a part of one; ``age_s`` seconds since it was last written."""

    key: str
    dataset_id: str
    job_id: str
    attempt: int | None
    """None: its name tells none."""
    age_s: float
    is_partial: bool


class DatasetFiles:
    """Files of clips of datasets. Each appears whole or not at all, and is never changed.

    Args:
        objects: Where they are kept, or a folder of the local disk.
    """

    def __init__(self, objects: Objects | Path) -> None:
        self.objects = LocalObjects(objects) if isinstance(objects, Path) else objects

    @staticmethod
    def key(dataset_id: str, job_id: str, attempt: int) -> str:
        """Key of the file of an attempt."""
        return f"{dataset_id}/{job_id[6:8]}/{job_id}.{attempt}"

    def write(self, dataset_id: str, job_id: str, attempt: int, write: Callable[[Path], T]) -> T:
        """Let ``write`` write a file, bring it to the disk, and give it its name; returns what ``write`` did.

        Raises:
            OSError: There is no room, or no right to write.
            StorageFullError: No room in the bucket.
        """
        key = self.key(dataset_id, job_id, attempt)
        partial = self.objects.stage(f"{key}.part")
        try:
            result = write(partial)
            sync(partial)
            self.objects.publish({partial: key})
        finally:
            partial.unlink(missing_ok=True)
        return result

    def remove(self, dataset_id: str, job_id: str, attempt: int) -> None:
        """Remove the file of an attempt, if it is there."""
        self.objects.remove(self.key(dataset_id, job_id, attempt))

    def discard(self, found: FoundClip) -> None:
        """Remove what was found."""
        self.objects.remove(found.key)

    def remove_all(self, dataset_id: str) -> None:
        """Remove all files of a dataset."""
        self.objects.remove_below(dataset_id)

    def files(self) -> Iterator[FoundClip]:
        """All files of all datasets, those of one behind one another."""
        for found in self.objects.list():
            dataset_id, _, rest = found.key.partition("/")
            name = rest.rpartition("/")[2]
            if is_dataset_id(dataset_id):
                job_id, _, rest = name.partition(".")
                number = rest.removesuffix(".part")
                attempt = int(number) if number.isdecimal() else None
                yield FoundClip(found.key, dataset_id, job_id, attempt, found.age_s, name.endswith(".part"))
