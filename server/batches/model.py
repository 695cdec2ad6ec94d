"""Tables and states of batches. What may become of a batch is written in :data:`TRANSITIONS` and nowhere else."""

import enum
import re
import secrets
from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, Double, ForeignKey, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from server.jobs.model import Base

__all__ = [
    "ACTIVE",
    "TRANSITIONS",
    "WINDOWS_S",
    "Batch",
    "BatchLine",
    "BatchStatus",
    "LineState",
    "is_batch_id",
    "new_batch_id",
]

_BIG = BigInteger().with_variant(Integer(), "sqlite")
_BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
_HOUR_S = 3600

WINDOWS_S = {
    "1h": _HOUR_S,
    "6h": 6 * _HOUR_S,
    "12h": 12 * _HOUR_S,
    "24h": 24 * _HOUR_S,
    "3d": 72 * _HOUR_S,
    "7d": 168 * _HOUR_S,
}
"""Completion windows that can be asked for -> seconds."""


class BatchStatus(enum.StrEnum):
    """State of a batch, in the words of OpenAI's contract."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ACTIVE = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.CANCELLING)
"""States in which there is something to do."""

TRANSITIONS: dict[BatchStatus, frozenset[BatchStatus]] = {
    BatchStatus.VALIDATING: frozenset(
        {BatchStatus.FAILED, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.CANCELLING}
    ),
    BatchStatus.IN_PROGRESS: frozenset({BatchStatus.FINALIZING, BatchStatus.CANCELLING}),
    BatchStatus.FINALIZING: frozenset({BatchStatus.COMPLETED, BatchStatus.EXPIRED}),
    BatchStatus.CANCELLING: frozenset({BatchStatus.CANCELLED}),
    BatchStatus.FAILED: frozenset(),
    BatchStatus.COMPLETED: frozenset(),
    BatchStatus.EXPIRED: frozenset(),
    BatchStatus.CANCELLED: frozenset(),
}
"""State -> states that may follow."""


class LineState(enum.StrEnum):
    """How far a line of a batch is."""

    PENDING = "pending"
    SUBMITTED = "submitted"
    """It has a job, whose end has not been seen yet."""
    COMPLETED = "completed"
    FAILED = "failed"
    """Refused, or its job came to a bad end."""


def new_batch_id() -> str:
    """An id that cannot be guessed and is safe in paths and URLs: ``batch_`` and 32 hex digits."""
    return f"batch_{secrets.token_hex(16)}"


def is_batch_id(text: str) -> bool:
    """Whether ``text`` could have come from :func:`new_batch_id`."""
    return _BATCH_ID.fullmatch(text) is not None


class Batch(Base):
    """What was asked, how far it is, what came of it. Times are Unix seconds of the database's clock."""

    __tablename__ = "batches"
    __table_args__ = (
        CheckConstraint(f"status in ({', '.join(repr(str(one)) for one in BatchStatus)})", name="ck_batches_status"),
        Index("ix_batches_tenant_seq", "tenant", "seq"),
        Index("ix_batches_status", "status"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    """Order of acceptance; the cursor of lists."""
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16), default=BatchStatus.VALIDATING.value)

    # what was asked
    endpoint: Mapped[str] = mapped_column(String(64))
    input_file_id: Mapped[str] = mapped_column(String(64), index=True)
    completion_window: Mapped[str] = mapped_column(String(8))
    output_expires_after_s: Mapped[int | None] = mapped_column(Integer)
    """Life of the output and error file in seconds from their creation; None: kept until they are deleted."""
    pairs: Mapped[dict[str, str] | None] = mapped_column("metadata", JSON(none_as_null=True))
    """What the client wants to remember with it."""

    # who works on it
    token: Mapped[int] = mapped_column(Integer, default=0)
    """Number of claims so far, and the fencing token of the newest one."""
    lease_until: Mapped[float | None] = mapped_column(Double)
    checked_lines: Mapped[int] = mapped_column(Integer, default=0)
    """Lines of the file that were looked at, blank ones included."""
    checked_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    """Where the next one begins."""
    total: Mapped[int] = mapped_column(Integer, default=0)
    completed: Mapped[int] = mapped_column(Integer, default=0)
    failed: Mapped[int] = mapped_column(Integer, default=0)

    # what came of it
    errors: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON(none_as_null=True))
    """Why the file was refused: code, message, param and line of each problem."""
    output_file_id: Mapped[str | None] = mapped_column(String(64))
    error_file_id: Mapped[str | None] = mapped_column(String(64))

    # when
    created_at: Mapped[float] = mapped_column(Double)
    expires_at: Mapped[float] = mapped_column(Double)
    """End of the completion window."""
    in_progress_at: Mapped[float | None] = mapped_column(Double)
    finalizing_at: Mapped[float | None] = mapped_column(Double)
    completed_at: Mapped[float | None] = mapped_column(Double)
    failed_at: Mapped[float | None] = mapped_column(Double)
    expired_at: Mapped[float | None] = mapped_column(Double)
    """When the window was over before all was done, or when it ended so."""
    cancelling_at: Mapped[float | None] = mapped_column(Double)
    cancelled_at: Mapped[float | None] = mapped_column(Double)


class BatchLine(Base):
    """A line of an unfinished batch. The row is what keeps a line from being submitted twice, or not at all."""

    __tablename__ = "batch_lines"
    __table_args__ = (
        Index("uq_batch_lines_custom_id", "batch_seq", "custom_id", unique=True),
        Index("ix_batch_lines_state", "batch_seq", "state", "line"),
    )

    batch_seq: Mapped[int] = mapped_column(BigInteger, ForeignKey("batches.seq"), primary_key=True)
    line: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Number of the line in the file, from 1."""
    custom_id: Mapped[str] = mapped_column(String(512))
    begin: Mapped[int] = mapped_column(BigInteger)
    """Byte of the file at which it begins."""
    length: Mapped[int] = mapped_column(Integer)
    """Its bytes."""
    state: Mapped[str] = mapped_column(String(16))
    job_id: Mapped[str | None] = mapped_column(String(64), unique=True)
    refusal: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """Answer to a line that was refused: status_code and body."""
