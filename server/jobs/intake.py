"""How jobs come into the table: within the limits of their tenants, and announced in the same transaction."""

import contextvars
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, func, insert, select

from server import logs, tracing
from server.errors import InProgressError
from server.events.jobs import announce_states
from server.idempotency import note_made
from server.jobs.database import database_now
from server.jobs.model import Job, JobStatus, new_job_id
from server.keys.limits import Allowance, Limits, Quota, count_usage

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


class Order:
    """One job that a client asks for, with the context of the request: another thread may write it down.

    Args:
        values: The columns of what was asked.
        max_queued: Most jobs that may wait, this one included.
    """

    def __init__(self, values: dict[str, Any], max_queued: int) -> None:
        self.job = _new(values)
        self.max_queued = max_queued
        self.context = contextvars.copy_context()


def take_orders(connection: Connection, orders: Sequence[Order], limits: Limits) -> list[Any]:
    """Insert the jobs of orders, within the caller's transaction, as if one came after the other.

    Args:
        limits: Of tenants that have none of their own.

    Returns:
        Of each the whole row, or why it was not taken: QueueFullError, QuotaReachedError, or InProgressError as
        :func:`server.idempotency.note_made` raises it.
    """
    waiting = int(connection.scalar(COUNT_WAITING) or 0)
    if all(waiting >= order.max_queued for order in orders):
        return [_queue_full(waiting, order) for order in orders]
    # of several tenants in the order in which all lock what was used
    allowances = {
        tenant: Allowance(connection, tenant, limits) for tenant in sorted({order.job["tenant"] for order in orders})
    }
    outcomes: list[Any] = []
    taken: list[Order] = []
    for order in orders:
        allowance = allowances[order.job["tenant"]]
        refusal = _refusal(connection, order, waiting + len(taken), allowance)
        outcomes.append(refusal)
        if refusal is None:
            allowance.take(order.job)
            taken.append(order)
    rows = iter(_insert(connection, [order.job for order in taken]))
    return [next(rows) if outcome is None else outcome for outcome in outcomes]


def insert_jobs(connection: Connection, jobs: Sequence[dict[str, Any]]) -> list[str]:
    """Insert jobs that wait, within the caller's transaction; returns their ids in the same order.

    They count for the quotas of their tenants; whether they are within them is for the caller to ask (``fitting``).

    Args:
        jobs: The columns of what was asked, of each job.
    """
    return [row.id for row in _insert(connection, [_new(job) for job in jobs])]


def _refusal(connection: Connection, order: Order, waiting: int, allowance: Allowance) -> Exception | None:
    """Why an order is not taken; None: it is, and the request that asks for it knows of it."""
    if waiting >= order.max_queued:
        return _queue_full(waiting, order)
    quota = allowance.exceeded_by(order.job)
    if quota is not None:
        return QuotaReachedError(quota)
    try:
        order.context.run(note_made, connection, order.job["id"])
    except InProgressError as error:
        return error
    return None


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
