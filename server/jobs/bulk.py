"""Jobs that belong to a larger order, a batch or a dataset: what the storage of both has in common."""

from typing import Protocol

from sqlalchemy import or_

from server.jobs.model import TERMINAL, Job

__all__ = ["AT_END", "FINISHED", "PRIORITY", "QUEUE_SHARE", "BulkRepository", "ClaimLostError"]

QUEUE_SHARE = 0.5
"""Of a tenant's places in the queue: so that it can ask for something else meanwhile."""
PRIORITY = -5
"""Of jobs that name none: one who waits for an answer comes before one's own larger orders."""
FINISHED = sorted(status.value for status in TERMINAL)
AT_END = or_(Job.id.is_(None), Job.deleted_at.is_not(None), Job.status.in_(FINISHED))
"""Of an order's job, joined from outside: nothing more will come of it."""


class ClaimLostError(Exception):
    """Another process has taken over the order, or its state is not what it was."""


class BulkRepository(Protocol):
    """Storage of orders of one kind."""

    def with_work(self, *, has_room: bool) -> list[int]:
        """Numbers of all orders with something to do now, oldest first."""

    def waiting_jobs(self) -> int:
        """Number of their jobs that wait for a worker."""
