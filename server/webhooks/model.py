"""Tables of webhooks: where to, and what is to be sent."""

import enum
import re
import secrets
from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, Double, Index, Integer, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from server.jobs.model import Base

__all__ = ["KINDS", "Delivery", "DeliveryState", "Webhook", "is_webhook_id", "new_delivery_id", "new_webhook_id"]

_BIG = BigInteger().with_variant(Integer(), "sqlite")
_ID = re.compile(r"wh_[0-9a-f]{32}")

KINDS = (
    "video.completed",
    "video.failed",
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "dataset.completed",
    "dataset.failed",
    "dataset.cancelled",
)
"""Events that are sent. A video that was cancelled is sent as failed, with the code cancelled, as the API tells it."""


class DeliveryState(enum.StrEnum):
    """What became of a message. The last two are for ever."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


def new_webhook_id() -> str:
    """An id that cannot be guessed: ``wh_`` and 32 hex digits."""
    return f"wh_{secrets.token_hex(16)}"


def is_webhook_id(text: str) -> bool:
    """Whether ``text`` could have come from :func:`new_webhook_id`."""
    return _ID.fullmatch(text) is not None


def new_delivery_id() -> str:
    """The ``webhook-id`` of a message, the same at every attempt: ``msg_`` and 32 hex digits."""
    return f"msg_{secrets.token_hex(16)}"


class Webhook(Base):
    """An address that hears of what happens to a tenant's objects."""

    __tablename__ = "webhooks"
    __table_args__ = (Index("ix_webhooks_tenant_seq", "tenant", "seq"), {"sqlite_autoincrement": True})

    seq: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(String(64))
    url: Mapped[str] = mapped_column(Text)
    kinds: Mapped[list[str]] = mapped_column(JSON)
    """Which of :data:`KINDS` it hears of."""
    secret: Mapped[str] = mapped_column(String(200))
    """Sealed (``server/sealing.py``): signing needs it in clear."""
    created_at: Mapped[float] = mapped_column(Double)


class Delivery(Base):
    """A message that is to be sent, or was: the outbox, and the log of deliveries."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("state in ('pending', 'delivered', 'failed')", name="ck_webhook_deliveries_state"),
        Index("ix_webhook_deliveries_state_next", "state", "next_at"),
        Index("ix_webhook_deliveries_webhook_seq", "webhook_id", "seq"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(String(64))
    webhook_id: Mapped[str | None] = mapped_column(String(64))
    """None: the address came with the request for the object."""
    url: Mapped[str] = mapped_column(Text)
    secret: Mapped[str | None] = mapped_column(String(200))
    """Of a request's own address, sealed; else the webhook's is used."""
    kind: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(64))
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
    state: Mapped[str] = mapped_column(String(16), default=DeliveryState.PENDING.value)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    """Begun so far; the number of the newest is its fencing token."""
    next_at: Mapped[float | None] = mapped_column(Double)
    """When to try (again); while an attempt is at work, when it counts as lost. None: it is over."""
    status_code: Mapped[int | None] = mapped_column(Integer)
    """Of the newest answer; None: there was none."""
    problem: Mapped[str | None] = mapped_column(Text)
    """Why the newest attempt came to nothing."""
    created_at: Mapped[float] = mapped_column(Double, index=True)
    attempted_at: Mapped[float | None] = mapped_column(Double)
    delivered_at: Mapped[float | None] = mapped_column(Double)
