"""Table of sources."""

import enum

from sqlalchemy import BigInteger, Double, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from server.jobs.model import Base

__all__ = ["Source", "SourceKind"]


class SourceKind(enum.StrEnum):
    """What becomes of a source."""

    REFERENCE = "reference"
    """The clip begins with its frames."""
    EDIT = "edit"
    """The clip is it, made anew in part."""
    EXTENSION = "extension"
    """The clip is it, and goes on."""


class Source(Base):
    """A picture or video whose bytes are on disk, whole. Times are Unix seconds of the database's clock."""

    __tablename__ = "sources"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Of the form of a file's id; the bytes lie under it in the folder of sources."""
    tenant: Mapped[str] = mapped_column(String(64))
    media: Mapped[str] = mapped_column(String(16))
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    num_frames: Mapped[int] = mapped_column(Integer)
    fps: Mapped[float | None] = mapped_column(Double)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Double)
