"""The table of events."""

from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Double, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from server.jobs.model import Base

__all__ = ["Event"]

_BIG = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows by itself only for INTEGER


class Event(Base):
    """Something that happened to an object, in the order in which it was committed."""

    __tablename__ = "events"
    __table_args__ = (
        Index("ix_events_subject_seq", "subject", "seq"),
        Index("ix_events_tenant_seq", "tenant", "seq"),
        {"sqlite_autoincrement": True},  # a place in the log must never come to mean another event
    )

    seq: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    """Place in the log: what clients name in Last-Event-ID."""
    tenant: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(64))
    """Such as ``video.completed``."""
    subject: Mapped[str] = mapped_column(String(64))
    """Id of the object that it happened to."""
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
    passing: Mapped[bool] = mapped_column(Boolean)
    """Whether the next event of this kind takes its place: progress and previews."""
    created_at: Mapped[float] = mapped_column(Double, index=True)
