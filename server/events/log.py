"""The log of events: written in the transaction of what happened, read by place, and bounded.

``emit`` is how anything is told to clients. Progress and previews take the place of their predecessors, so an object
has few rows however long it takes; all rows go after a while.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select, text

from server.events.model import Event
from server.jobs.database import Database, database_now, lock_rows
from server.webhooks.outbox import Message, put_out

__all__ = ["EventLog", "EventRecord", "NewEvent", "emit", "emit_all"]

_TABLE: Any = Event.__table__
_INSERT = insert(_TABLE).values(created_at=database_now())  # put together once
_FORGET_BEFORE = delete(Event).where(
    Event.subject.in_(bindparam("subjects", expanding=True)), Event.kind == bindparam("of"), Event.passing.is_(True)
)
_LOCK_KEY = 0x6D657674  # any number of our own for pg_advisory_xact_lock
_SWEPT_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True)
class NewEvent:
    """An event that is about to be written; see :class:`server.events.model.Event`."""

    tenant: str
    kind: str
    subject: str
    data: dict[str, Any]
    passing: bool = False
    webhook_url: str | None = None
    """An address that came with the request for the object: it hears of its end, besides the tenant's webhooks."""
    webhook_secret: str | None = None


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """An event of the log, detached; see :class:`server.events.model.Event`."""

    seq: int
    tenant: str
    kind: str
    subject: str
    data: dict[str, Any]
    passing: bool
    created_at: float


def emit(
    connection: Connection, *, tenant: str, kind: str, subject: str, data: dict[str, Any], passing: bool = False
) -> None:
    """Tell that something happened, in the transaction in which it does. Call it last in that transaction.

    Who listens (``/v1/events``) hears of it, and so do webhooks, where it is one of ``server.webhooks.model.KINDS``.

    Args:
        kind: ``<object>.<what>``, such as ``batch.completed``.
        subject: Id of the object.
        data: What is told: JSON, with the object's ``id``. Never a prompt or a secret.
        passing: Whether only the newest event of this kind counts.
    """
    emit_all(connection, [NewEvent(tenant=tenant, kind=kind, subject=subject, data=data, passing=passing)])


def emit_all(connection: Connection, events: Sequence[NewEvent]) -> None:
    """As :func:`emit`, several at once."""
    if not events:
        return
    if connection.dialect.name == "postgresql":
        # Readers ask for what is behind a place: no row may become visible in front of one that already is.
        connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
    passing: dict[str, list[str]] = {}
    for event in events:
        if event.passing:
            passing.setdefault(event.kind, []).append(event.subject)
    for kind, subjects in passing.items():
        connection.execute(_FORGET_BEFORE, {"subjects": subjects, "of": kind})
    rows = [
        {"tenant": one.tenant, "kind": one.kind, "subject": one.subject, "data": one.data, "passing": one.passing}
        for one in events
    ]
    connection.execute(_INSERT, rows)
    put_out(
        connection,
        [
            Message(
                tenant=event.tenant,
                kind=event.kind,
                subject=event.subject,
                data=event.data,
                url=event.webhook_url,
                secret=event.webhook_secret,
            )
            for event in events
        ],
    )


class EventLog:
    """Reading side of the log. Safe to use from several threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def end(self) -> int:
        """Place of the newest event; 0 when there is none."""
        with self._database.read() as connection:
            return connection.scalar(select(func.max(Event.seq))) or 0

    def after(
        self, seq: int, *, limit: int, subject: str | None = None, tenant: str | None = None
    ) -> list[EventRecord]:
        """The first events behind a place, in order: of one object, of one tenant, or all."""
        query = select(_TABLE).where(Event.seq > seq)
        if subject is not None:
            query = query.where(Event.subject == subject)
        if tenant is not None:
            query = query.where(Event.tenant == tenant)
        with self._database.read() as connection:
            return [EventRecord(**row._mapping) for row in connection.execute(query.order_by(Event.seq).limit(limit))]

    def sweep(self, *, kept_s: float, max_rows: int) -> int:
        """Remove a portion of the events that are too old or too many; returns how many."""
        with self._database.read() as connection:
            newest = connection.scalar(select(func.max(Event.seq))) or 0
            old = select(Event.seq).where(Event.created_at < database_now() - kept_s)
            surplus = select(Event.seq).where(Event.seq <= newest - max_rows)
            gone = [
                seq
                for query in (old, surplus)
                for seq in connection.scalars(query.order_by(Event.seq).limit(_SWEPT_AT_ONCE))
            ]
        if not gone:
            return 0
        with self._database.write() as connection:
            seqs = select(Event.seq).where(Event.seq.in_(gone[:_SWEPT_AT_ONCE])).order_by(Event.seq)
            return connection.execute(delete(Event).where(Event.seq.in_(lock_rows(connection, seqs)))).rowcount
