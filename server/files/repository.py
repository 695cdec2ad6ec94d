"""All queries of the file table. Each method is one transaction.

Nobody but its tenant sees a file, and nobody sees one that was deleted or whose time is over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, not_, or_, select, update

from server.files.model import File
from server.files.store import WrittenFile
from server.idempotency import note_made
from server.jobs.database import Database, database_now
from server.jobs.repository import CURSOR_KEPT_S

__all__ = ["FileRecord", "FileRepository", "insert_file"]

_TABLE: Any = File.__table__


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A row of the file table, detached; the columns are described in :class:`server.files.model.File`."""

    seq: int
    id: str
    tenant: str
    purpose: str
    filename: str
    size_bytes: int
    sha256: str
    created_at: float
    expires_at: float | None
    deleted_at: float | None
    removed_at: float | None


def insert_file(
    connection: Connection,
    *,
    file_id: str,
    tenant: str,
    purpose: str,
    filename: str,
    written: WrittenFile,
    expires_after_s: float | None,
) -> FileRecord:
    """Make the row of a file whose bytes are on disk, within the caller's transaction."""
    values = {
        "id": file_id,
        "tenant": tenant,
        "purpose": purpose,
        "filename": filename,
        "size_bytes": written.size_bytes,
        "sha256": written.sha256,
        "created_at": database_now(),
        "expires_at": None if expires_after_s is None else database_now() + expires_after_s,
    }
    return FileRecord(**connection.execute(insert(_TABLE).values(values).returning(*_TABLE.c)).one()._mapping)


class FileRepository:
    """Rows of files on one database. Safe to use from several threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        *,
        file_id: str,
        tenant: str,
        purpose: str,
        filename: str,
        written: WrittenFile,
        expires_after_s: float | None,
    ) -> FileRecord:
        """Make the row of a file whose bytes are on disk; it is durable when this returns."""
        with self._database.write() as connection:
            note_made(connection, file_id)
            return insert_file(
                connection,
                file_id=file_id,
                tenant=tenant,
                purpose=purpose,
                filename=filename,
                written=written,
                expires_after_s=expires_after_s,
            )

    def get(self, tenant: str, file_id: str) -> FileRecord | None:
        """The file, or None when this tenant has none of that id."""
        query = select(_TABLE).where(File.id == file_id, File.tenant == tenant, _visible())
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else FileRecord(**row._mapping)

    def page(
        self, tenant: str, *, purpose: str | None, limit: int, after: str | None, newest_first: bool
    ) -> tuple[list[FileRecord], bool] | None:
        """Files behind the cursor ``after``, and whether there are more; None when it is no file of the tenant.

        A file that was deleted lately still serves as a cursor.
        """
        query = select(_TABLE).where(File.tenant == tenant, _visible())
        if purpose is not None:
            query = query.where(File.purpose == purpose)
        with self._database.read() as connection:
            if after is not None:
                cursor = connection.scalar(select(File.seq).where(File.id == after, File.tenant == tenant))
                if cursor is None:
                    return None
                query = query.where(File.seq < cursor if newest_first else File.seq > cursor)
            order = File.seq.desc() if newest_first else File.seq.asc()
            rows = connection.execute(query.order_by(order).limit(limit + 1)).all()
        return [FileRecord(**row._mapping) for row in rows[:limit]], len(rows) > limit

    def delete(self, tenant: str, file_id: str) -> bool:
        """Hide a file for good. False when there is none."""
        statement = update(File).where(File.id == file_id, File.tenant == tenant, _visible())
        with self._database.write() as connection:
            return connection.execute(statement.values(deleted_at=database_now())).rowcount == 1

    def removable(self, *, in_use: ColumnElement[bool], limit: int) -> list[str]:
        """Ids of files that were deleted or whose time is over, whose bytes are there and read by nobody.

        Args:
            in_use: True of rows whose bytes are still needed.
        """
        gone = or_(File.deleted_at.is_not(None), File.expires_at <= database_now())
        query = select(File.id).where(gone, File.removed_at.is_(None), not_(in_use)).limit(limit)
        with self._database.read() as connection:
            return list(connection.scalars(query))

    def mark_removed(self, file_ids: Sequence[str]) -> None:
        """Record that the bytes of these files are gone, and forget files whose bytes went more than a day ago."""
        with self._database.write() as connection:
            statement = update(File).where(File.id.in_(file_ids), File.removed_at.is_(None))
            connection.execute(statement.values(removed_at=database_now()))
            connection.execute(delete(File).where(File.removed_at < database_now() - CURSOR_KEPT_S))

    def known(self, file_ids: Sequence[str]) -> set[str]:
        """Those of the ids that have a row."""
        with self._database.read() as connection:
            return set(connection.scalars(select(File.id).where(File.id.in_(file_ids))))


def _visible() -> ColumnElement[bool]:
    return and_(File.deleted_at.is_(None), or_(File.expires_at.is_(None), File.expires_at > database_now()))
