"""Finished videos. A name that a client can ask for always holds a whole, checked file.

They are objects (``objects.py``) with keys ``<2 hex digits>/<job id>.<attempt>.mp4``, what is made of a video beside it
(``<job id>.<attempt>.lossless.mkv``, ``.thumbnail.webp``, ``.spritesheet.jpg``, ``.provenance.json``), and for a while
``.live.mp4``, which is followed while a long one is made. While one is written, ``.part`` stands before its last
suffix. The attempt in the name keeps apart two workers that believe to own one job. This module knows no format: how to
write and to check a file is handed in.
"""

import enum
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from medsora.files import sha256_of, sync
from server.objects import GrowingObject, LocalObjects, Objects, StorageFullError, is_full, on_disk

__all__ = ["ArtifactInfo", "ArtifactStore", "StorageFullError", "StoredFile", "Variant", "job_id_of"]


class Variant(enum.StrEnum):
    """What of a clip a file holds. The names are those of OpenAI's contract."""

    VIDEO = "video"
    THUMBNAIL = "thumbnail"
    SPRITESHEET = "spritesheet"
    PROVENANCE = "provenance"
    """What made it, as JSON."""
    LOSSLESS = "lossless"
    """The video, exact to the bit; not of every video."""


_SUFFIXES = {
    Variant.VIDEO: ".mp4",
    Variant.THUMBNAIL: ".thumbnail.webp",
    Variant.SPRITESHEET: ".spritesheet.jpg",
    Variant.PROVENANCE: ".provenance.json",
    Variant.LOSSLESS: ".lossless.mkv",
}
_NAME = re.compile(
    r"(?P<stem>(?P<shard>[0-9a-f]{2})/(?P<job>video_[0-9a-f]{32})\.(?P<attempt>[0-9]{1,9}))"
    r"(?:(?:\.part)?\.mp4|(?P<live>\.live)\.mp4(?:/[0-9]{6})?|\.thumbnail(?:\.part)?\.webp"
    r"|\.spritesheet(?:\.part)?\.jpg|\.provenance(?:\.part)?\.json"
    r"|\.lossless(?:\.part)?\.mkv)"
)


@dataclass(frozen=True, kw_only=True)
class ArtifactInfo:
    """A file that was written: its name in the store, size and hash."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file found in the store."""

    name: str
    job_id: str
    attempt: int
    is_partial: bool
    video: str
    """Name of the video that it is, or that it was made from."""
    is_live: bool
    """What was followed while the video was made."""
    age_s: float
    """Seconds since it was last written."""


class ArtifactStore:
    """Videos and what is made of them.

    Args:
        objects: Where they are kept, or a folder of the local disk.
    """

    def __init__(self, objects: Objects | Path) -> None:
        self.objects = LocalObjects(objects) if isinstance(objects, Path) else objects

    def write(
        self,
        job_id: str,
        attempt: int,
        write: Callable[[Path], None],
        check: Callable[[Path], None],
        *,
        variant: Variant = Variant.VIDEO,
    ) -> ArtifactInfo:
        """:meth:`write_all` for one file."""
        return self.write_all(job_id, attempt, {variant: (write, check)})[variant]

    def write_all(
        self,
        job_id: str,
        attempt: int,
        files: Mapping[Variant, tuple[Callable[[Path], None], Callable[[Path], None]]],
    ) -> dict[Variant, ArtifactInfo]:
        """Let files be made, and publish them under their final names once all of them are accepted.

        Args:
            files: Of each variant two functions: one that writes, called with a temporary path that ends as the final
                one does, e.g. in ``.mp4``; one that checks, called with the same path when the content is on disk, and
                raises to refuse it.

        Raises:
            StorageFullError: No room.
            StorageUnavailableError: The bucket does not take them. Whatever else the functions raise goes through. In
                each case no file is left, as far as the bucket lets it be removed.
        """
        stored = {}
        made: dict[Path, str] = {}
        name = ""
        try:
            for variant, (write, check) in files.items():
                name = _name(job_id, attempt, variant)
                partial = self.partial_path(job_id, attempt, variant)
                made[partial] = name
                write(partial)
                sync(partial)
                check(partial)
                stored[variant] = ArtifactInfo(name=name, size_bytes=partial.stat().st_size, sha256=sha256_of(partial))
            self.objects.publish(made)
        except BaseException as error:
            for partial, name in made.items():
                partial.unlink(missing_ok=True)
                with suppress(OSError):  # the reaper removes what stays
                    self.objects.remove(name)
            if is_full(error):
                raise StorageFullError(f"no room for {name}") from error
            raise
        return stored

    def key(self, name: str, variant: Variant = Variant.VIDEO) -> str:
        """Key of a stored file, or of the ``variant`` that lies beside the video of that name.

        Raises:
            ValueError: Not a name of this store.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"not the name of an artifact: {name!r}")
        return name if variant is Variant.VIDEO else match["stem"] + _SUFFIXES[variant]

    def path(self, name: str, variant: Variant = Variant.VIDEO) -> Path:
        """Path of a stored file, where they are kept on this machine.

        Raises:
            ValueError: Not a name of this store, or it keeps its files in a bucket.
        """
        return on_disk(self.objects).path(self.key(name, variant))

    def partial_path(self, job_id: str, attempt: int, variant: Variant) -> Path:
        """The path that :meth:`write_all` has a file written to, for what is written together with another one.

        Raises:
            ValueError: Not the id of a job.
        """
        stem, _, ending = _name(job_id, attempt, variant).rpartition(".")
        return self.objects.stage(f"{stem}.part.{ending}")

    def live_path(self, job_id: str, attempt: int) -> Path:
        """Path of what can be followed, where it is kept on this machine.

        Raises:
            ValueError: Not the id of a job, or files are kept in a bucket.
        """
        return on_disk(self.objects).path(_live_name(job_id, attempt))

    def grow_live(self, job_id: str, attempt: int) -> GrowingObject:
        """Begin what can be followed of an attempt at a long video: not whole, nor checked, until it is done.

        Raises:
            ValueError: Not the id of a job.
        """
        return self.objects.grow(_live_name(job_id, attempt))

    def follow_live(self, job_id: str, attempt: int) -> BinaryIO:
        """What can be followed of an attempt.

        Raises:
            FileNotFoundError: Nothing yet.
            ValueError: Not the id of a job.
        """
        return self.objects.follow(_live_name(job_id, attempt))

    def remove(self, name: str) -> None:
        """Remove a file for good; nothing happens when it is not there."""
        self.objects.remove(self.key(name))

    def remove_attempts(self, job_id: str, *, before: int | None = None) -> None:
        """Remove all files of a job, whole or partial; with ``before`` only those of earlier attempts."""
        self._remove_where(job_id, lambda attempt: before is None or attempt < before)

    def remove_attempt(self, job_id: str, attempt: int) -> None:
        """Remove all files of one attempt at a job for good, whole or partial."""
        self._remove_where(job_id, lambda found: found == attempt)

    def _remove_where(self, job_id: str, is_meant: Callable[[int], bool]) -> None:
        for found in self.objects.list(f"{_shard(job_id)}/{job_id}."):
            match = _NAME.fullmatch(found.key)
            if match is not None and is_meant(int(match["attempt"])):
                self.objects.remove(found.key)

    def files(self) -> Iterator[StoredFile]:
        """All files of the store, in no order. Files that it did not make are left out."""
        for found in self.objects.list():
            match = _NAME.fullmatch(found.key)
            if match is not None:
                yield StoredFile(
                    name=found.key,
                    job_id=match["job"],
                    attempt=int(match["attempt"]),
                    is_partial=".part." in found.key,
                    video=match["stem"] + _SUFFIXES[Variant.VIDEO],
                    is_live=match["live"] is not None,
                    age_s=found.age_s,
                )

    def free_bytes(self) -> int:
        """Free bytes on the disk that files are written to first."""
        return self.objects.free_bytes()


def job_id_of(name: str) -> str | None:
    """Job that a stored file belongs to, or None when it is no name of a store."""
    match = _NAME.fullmatch(name)
    return None if match is None else match["job"]


def _shard(job_id: str) -> str:
    return job_id.removeprefix("video_")[:2]


def _name(job_id: str, attempt: int, variant: Variant) -> str:
    name = f"{_shard(job_id)}/{job_id}.{attempt}{_SUFFIXES[variant]}"
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"not a job id: {job_id!r}")
    return name


def _live_name(job_id: str, attempt: int) -> str:
    return _name(job_id, attempt, Variant.VIDEO).replace(".mp4", ".live.mp4")
