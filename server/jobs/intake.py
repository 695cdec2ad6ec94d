"""How jobs come into the table: within the limits of their tenants, and announced in the same transaction."""

import contextvars
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, func, insert, select

from server import logs, tracing
from server.errors import InProgressError
from server.events.jobs import announce_states
from server.idempotency import note_made
from server.jobs.database import database_now
from server.jobs.model import Job, JobStatus, new_job_id
from server.keys.limits import Limits, Quota, count_usage, fitting

__all__ = ["COUNT_WAITING", "Order", "QueueFullError", "QuotaReachedError", "insert_jobs", "take_orders"]

_TABLE: Any = Job.__table__
COUNT_WAITING = select(func.count()).where(Job.status == JobStatus.QUEUED)  # these are put together once
_UNLESS_ASKED = {
    column.name: None if column.default is None else column.default.arg
    for column in _TABLE.c
    if column.nullable or column.default is not None
}
_INSERT = insert(_TABLE).values(created_at=database_now(), queued_at=database_now()).returning(*_TABLE.c)


class QueueFullError(Exception):
    """As many jobs wait as may wait."""


class QuotaReachedError(Exception):
    """A tenant may have no more of something."""

    def __init__(self, quota: Quota) -> None:
        super().__init__(quota.message)
        self.quota = quota


@dataclass(frozen=True)
class Order:
    """One job that a client asks for."""

    job: dict[str, Any]
    """The columns of what was asked; completed when the order is made."""
    max_queued: int
    """Most jobs that may wait, this one included."""
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    """Of the request: another thread may write it down."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "job", _new(self.job))


def take_orders(connection: Connection, orders: Sequence[Order], limits: Limits) -> list[Any]:
    """Insert the jobs of orders, within the caller's transaction, as if one came after the other.

    Args:
        limits: Of tenants that have none of their own.

    Returns:
        Of each the whole row, or why it was not taken: QueueFullError, QuotaReachedError, or InProgressError as
        :func:`server.idempotency.note_made` raises it.
    """
    outcomes: dict[int, Any] = {}
    waiting = int(connection.scalar(COUNT_WAITING) or 0)
    if all(waiting >= order.max_queued for order in orders):
        return [_queue_full(waiting, order) for order in orders]
    within: list[int] = []
    for tenant in sorted({order.job["tenant"] for order in orders}):  # the order in which all lock what was used
        asked = [number for number, order in enumerate(orders) if order.job["tenant"] == tenant]
        refusals = _quotas_reached(connection, tenant, {number: orders[number].job for number in asked}, limits)
        outcomes |= refusals
        within += [number for number in asked if number not in refusals]
    taken: list[int] = []
    for number in sorted(within):
        order = orders[number]
        if waiting + len(taken) >= order.max_queued:
            outcomes[number] = _queue_full(waiting + len(taken), order)
            continue
        try:
            order.context.run(note_made, connection, order.job["id"])
        except InProgressError as error:
            outcomes[number] = error
        else:
            taken.append(number)
    outcomes |= zip(taken, _insert(connection, [orders[number].job for number in taken]), strict=True)
    return [outcomes[number] for number in range(len(orders))]


def insert_jobs(connection: Connection, jobs: Sequence[dict[str, Any]]) -> list[str]:
    """Insert jobs that wait, within the caller's transaction; returns their ids in the same order.

    They count for the quotas of their tenants; whether they are within them is for the caller to ask (``fitting``).

    Args:
        jobs: The columns of what was asked, of each job.
    """
    return [row.id for row in _insert(connection, [_new(job) for job in jobs])]


def _quotas_reached(
    connection: Connection, tenant: str, jobs: Mapping[int, dict[str, Any]], limits: Limits
) -> dict[int, QuotaReachedError]:
    """Which of a tenant's jobs are beyond its limits: a small one may fit where a larger one does not."""
    refused: dict[int, QuotaReachedError] = {}
    while True:
        left = [number for number in jobs if number not in refused]
        fit = fitting(connection, tenant, [jobs[number] for number in left], limits)
        if fit.quota is None:
            return refused
        refused[left[fit.num_jobs]] = QuotaReachedError(fit.quota)


def _insert(connection: Connection, rows: Sequence[dict[str, Any]]) -> list[Any]:
    if not rows:
        return []
    count_usage(connection, rows)
    inserted = {row.id: row for row in connection.execute(_INSERT, rows)}
    in_order = [inserted[row["id"]] for row in rows]
    announce_states(connection, in_order)
    return in_order


def _queue_full(waiting: int, order: Order) -> QueueFullError:
    return QueueFullError(f"{waiting} jobs are waiting, {order.max_queued} may")


def _new(values: dict[str, Any]) -> dict[str, Any]:
    """All columns of a row, whatever was asked: of several rows the first says which columns are written."""
    return {
        **_UNLESS_ASKED,
        "id": new_job_id(),
        "request_id": logs.current().get("request_id"),
        "traceparent": tracing.traceparent(),
        **values,
    }
