"""Table of files."""

import re
import secrets

from sqlalchemy import BigInteger, Double, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from server.jobs.model import Base

__all__ = ["PURPOSES", "UPLOAD_PURPOSES", "File", "is_file_id", "new_file_id"]

UPLOAD_PURPOSES = ("batch", "vision")
"""What a client may upload a file for: a batch, or a picture or video that clips are made from."""
PURPOSES = (*UPLOAD_PURPOSES, "batch_output")
"""What files are there for; the last ones are made by the server."""

_BIG = BigInteger().with_variant(Integer(), "sqlite")
_FILE_ID = re.compile(r"file-[0-9a-f]{32}")


def new_file_id() -> str:
    """An id that cannot be guessed and is safe in paths and URLs: ``file-`` and 32 hex digits."""
    return f"file-{secrets.token_hex(16)}"


def is_file_id(text: str) -> bool:
    """Whether ``text`` could have come from :func:`new_file_id`."""
    return _FILE_ID.fullmatch(text) is not None


class File(Base):
    """A file whose bytes are on disk, whole and checked. Times are Unix seconds of the database's clock."""

    __tablename__ = "files"
    __table_args__ = (Index("ix_files_tenant_seq", "tenant", "seq"), {"sqlite_autoincrement": True})

    seq: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    """Order of creation; the cursor of lists."""
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(String(64))
    purpose: Mapped[str] = mapped_column(String(32))
    filename: Mapped[str] = mapped_column(String(255))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Double)
    expires_at: Mapped[float | None] = mapped_column(Double, index=True)
    """From then on nobody sees it; None: kept until it is deleted."""
    deleted_at: Mapped[float | None] = mapped_column(Double, index=True)
    """When the client deleted it. The bytes go once no unfinished batch reads them."""
    removed_at: Mapped[float | None] = mapped_column(Double, index=True)
    """When the bytes went. The row stays for a day, as a cursor for whoever deletes while paging."""
