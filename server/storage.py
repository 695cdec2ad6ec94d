"""Finished videos on disk. A name that a client can ask for always holds a whole, checked file.

Files lie in ``<root>/<2 hex digits>/<job id>.<attempt>.mp4``, what is made of a video beside it
(``<job id>.<attempt>.lossless.mkv``, ``.thumbnail.webp``, ``.spritesheet.jpg``, ``.provenance.json``), and for a while
``.live.mp4``, which is followed while a long one is made. While one is written, ``.part`` stands before its last
suffix. The attempt in the name keeps apart two workers that believe to own one job. This module knows no format: how to
write and to check a file is handed in.
"""

import enum
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from medsora.files import sha256_of, sync

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
    r"(?:(?:\.part)?\.mp4|(?P<live>\.live)\.mp4|\.thumbnail(?:\.part)?\.webp"
    r"|\.spritesheet(?:\.part)?\.jpg|\.provenance(?:\.part)?\.json"
    r"|\.lossless(?:\.part)?\.mkv)"
)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class StorageFullError(Exception):
    """There is no room for the file; nothing of it is left."""


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
    """Folder of videos on a local disk.

    Args:
        root: Made when the first file is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

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
            StorageFullError: No room. Whatever else the functions raise goes through. In each case no file is left.
        """
        stored = {}
        made: dict[Path, Path] = {}
        name = ""
        try:
            for variant, (write, check) in files.items():
                name = _name(job_id, attempt, variant)
                target = self.root / name
                partial = self.partial_path(job_id, attempt, variant)
                made[partial] = target
                target.parent.mkdir(parents=True, exist_ok=True)
                write(partial)
                sync(partial)
                check(partial)
                stored[variant] = ArtifactInfo(name=name, size_bytes=partial.stat().st_size, sha256=sha256_of(partial))
            for partial, target in made.items():
                partial.replace(target)
            sync(self.root / _shard(job_id))  # once for all of them: they lie in one folder
        except BaseException as error:
            for partial, target in made.items():
                partial.unlink(missing_ok=True)
                target.unlink(missing_ok=True)
            if _is_full(error):
                raise StorageFullError(f"no room for {name} below {self.root}") from error
            raise
        return stored

    def path(self, name: str, variant: Variant = Variant.VIDEO) -> Path:
        """Path of a stored file, or of the ``variant`` that lies beside the video of that name.

        Raises:
            ValueError: Not a name of this store.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"not the name of an artifact: {name!r}")
        if variant is not Variant.VIDEO:
            name = match["stem"] + _SUFFIXES[variant]
        return self.root / name

    def partial_path(self, job_id: str, attempt: int, variant: Variant) -> Path:
        """The path that :meth:`write_all` has a file written to, for what is written together with another one.

        Raises:
            ValueError: Not the id of a job.
        """
        target = self.root / _name(job_id, attempt, variant)
        return target.with_suffix(f".part{target.suffix}")

    def live_path(self, job_id: str, attempt: int) -> Path:
        """Where an attempt at a long video writes what can be followed: not whole, nor checked, until it is done.

        Raises:
            ValueError: Not the id of a job.
        """
        return self.root / _name(job_id, attempt, Variant.VIDEO).replace(".mp4", ".live.mp4")

    def remove(self, name: str) -> None:
        """Remove a file for good; nothing happens when it is not there."""
        path = self.path(name)
        try:
            path.unlink()
        except FileNotFoundError:
            return
        sync(path.parent)

    def remove_attempts(self, job_id: str, *, before: int | None = None) -> None:
        """Remove all files of a job, whole or partial; with ``before`` only those of earlier attempts."""
        self._remove_where(job_id, lambda attempt: before is None or attempt < before)

    def remove_attempt(self, job_id: str, attempt: int) -> None:
        """Remove all files of one attempt at a job for good, whole or partial."""
        if self._remove_where(job_id, lambda found: found == attempt):
            sync(self.root / _shard(job_id))

    def _remove_where(self, job_id: str, is_meant: Callable[[int], bool]) -> int:
        removed = 0
        for path in (self.root / _shard(job_id)).glob(f"{job_id}.*"):
            match = _NAME.fullmatch(f"{path.parent.name}/{path.name}")
            if match is not None and is_meant(int(match["attempt"])):
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def files(self) -> Iterator[StoredFile]:
        """All files of the store, in no order. Files that it did not make are left out."""
        now = time.time()
        for shard in sorted(self.root.glob("[0-9a-f][0-9a-f]")):
            for entry in os.scandir(shard):
                match = _NAME.fullmatch(f"{shard.name}/{entry.name}")
                if match is None:
                    continue
                try:
                    modified = entry.stat().st_mtime
                except FileNotFoundError:
                    continue
                yield StoredFile(
                    name=match.group(),
                    job_id=match["job"],
                    attempt=int(match["attempt"]),
                    is_partial=".part." in entry.name,
                    video=match["stem"] + _SUFFIXES[Variant.VIDEO],
                    is_live=match["live"] is not None,
                    age_s=now - modified,
                )

    def free_bytes(self) -> int:
        """Free bytes on the disk that holds the store (or will)."""
        folder = self.root
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free


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


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is the disk, the quota or the file size limit being used up."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
