"""All queries of the table of sources. Each method is one transaction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, exists, insert, select

from server.files.store import WrittenFile
from server.jobs.database import Database, database_now
from server.jobs.model import Job
from server.sources.media import Media
from server.sources.model import Source

__all__ = ["SourceRecord", "SourceRepository"]

_TABLE: Any = Source.__table__


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """A row of the table, detached; the columns are described in :class:`server.sources.model.Source`."""

    id: str
    tenant: str
    media: str
    width: int
    height: int
    num_frames: int
    fps: float | None
    size_bytes: int
    sha256: str
    created_at: float


class SourceRepository:
    """Storage of sources on one database. Safe to use from several threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, source_id: str, *, tenant: str, media: Media, written: WrittenFile) -> SourceRecord:
        """Make the row of a source whose bytes are on disk."""
        values = {
            "id": source_id,
            "tenant": tenant,
            "media": media.kind,
            "width": media.width,
            "height": media.height,
            "num_frames": media.num_frames,
            "fps": media.fps,
            "size_bytes": written.size_bytes,
            "sha256": written.sha256,
            "created_at": database_now(),
        }
        with self._database.write() as connection:
            row = connection.execute(insert(_TABLE).values(values).returning(*_TABLE.c)).one()
        return SourceRecord(**row._mapping)

    def get(self, source_id: str) -> SourceRecord | None:
        """The source of that id; for workers and services, who know of whose job it is."""
        with self._database.read() as connection:
            row = connection.execute(select(_TABLE).where(Source.id == source_id)).one_or_none()
        return None if row is None else SourceRecord(**row._mapping)

    def forget(self, source_id: str) -> bool:
        """Remove the row of a source. False when a job refers to it, or there is none."""
        unused = delete(Source).where(Source.id == source_id, ~exists().where(Job.source_id == Source.id))
        with self._database.write() as connection:
            return connection.execute(unused).rowcount == 1

    def forget_unused(self, *, older_than_s: float, limit: int) -> list[str]:
        """Remove the rows of sources that no job refers to; returns their ids, whose bytes are to go.

        Args:
            older_than_s: Younger ones may belong to a job that is about to be accepted.
        """
        unused = (
            select(Source.id)
            .where(
                Source.created_at < database_now() - older_than_s,
                ~exists().where(Job.source_id == Source.id),
            )
            .limit(limit)
        )
        with self._database.write() as connection:
            ids = list(connection.scalars(unused))
            if ids:
                connection.execute(delete(Source).where(Source.id.in_(ids)))
        return ids

    def known(self, source_ids: Sequence[str]) -> set[str]:
        """Those of the ids that have a row."""
        with self._database.read() as connection:
            return set(connection.scalars(select(Source.id).where(Source.id.in_(source_ids))))
