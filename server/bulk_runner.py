"""What those share that make many jobs a portion at a time: batches and datasets.

How many they may make now, how the broker is told of them, and the loop that looks at all of them again and again.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from sqlalchemy.exc import SQLAlchemyError

from server.jobs.bulk import BulkRepository, ClaimLostError
from server.jobs.queue import JobQueue, QueueError
from server.jobs.repository import JobRepository
from server.settings import Settings
from server.storage import StorageFullError

__all__ = ["BulkRunner"]

logger = logging.getLogger(__name__)

_LEAST_QUEUED = 8
"""Jobs that may wait whatever the pace: else a start from rest would never come about."""
_ORPHAN_S = 3600.0
"""Nobody is still writing a file that has not grown for so long."""


class BulkRunner(ABC):
    """Looks at all orders of one kind again and again.

    Args:
        settings: Intervals and limits.
        kind: What one of the orders is called, for the log.
        orders: Where they are kept.
        queue: Told of the jobs that were made.
    """

    def __init__(
        self, settings: Settings, *, kind: str, orders: BulkRepository, repository: JobRepository, queue: JobQueue
    ) -> None:
        self._settings, self._kind, self._orders = settings, kind, orders
        self._repository, self._queue = repository, queue
        self._next_scan = 0.0  # of the steady clock

    @abstractmethod
    def _advance(self, seq: int, *, share: int) -> bool:
        """One portion of work on an order, at most ``share`` new jobs; returns whether there is more to do at once."""

    @abstractmethod
    def remove_orphans(self, *, older_than_s: float) -> int:
        """Remove files that belong to nothing and are old; returns their number."""

    def tidy(self) -> None:  # noqa: B027 - nothing, unless there is something
        """What is to be done beside the orders, at every look."""

    def run(self, stop: threading.Event) -> None:
        """Work until ``stop`` is set. An outage of database, broker or disk is waited out."""
        while not stop.is_set():
            try:
                moved = self.look()
                self.tidy()
                if time.monotonic() >= self._next_scan:
                    self._next_scan = time.monotonic() + self._settings.orphan_scan_s
                    self.remove_orphans(older_than_s=_ORPHAN_S)
            except Exception:  # whatever it is, work goes on when it is over
                logger.exception("a look at every %s failed", self._kind)
                moved = False
            if not moved:
                stop.wait(self._settings.batch_interval_s)

    def look(self) -> bool:
        """Do one portion of work on each order; returns whether there is more to do at once."""
        moved = False
        try:
            room = self._room()
            active = self._orders.with_work(has_room=room > 0)
        except SQLAlchemyError as error:
            logger.warning("every %s waits: %s", self._kind, error)
            return False
        for seq in active:
            try:
                moved |= self._advance(seq, share=-(-room // len(active)))
            except ClaimLostError as error:
                logger.info("%s is not what it was: cancelled, deleted, or worked on by another", error)
            except (SQLAlchemyError, OSError, StorageFullError) as error:
                logger.warning("%s %d waits: %s", self._kind, seq, error)
        return moved

    def _room(self) -> int:
        """Number of jobs that may be made now, so that other requests still find a place in the queue."""
        settings = self._settings
        pace = self._repository.count_done(within_s=settings.batch_queued_s, limit=settings.batch_queued_jobs)
        of_kind = min(settings.batch_queued_jobs, max(_LEAST_QUEUED, pace)) - self._orders.waiting_jobs()
        of_all = settings.max_queued_jobs // 2 - self._repository.count_waiting()
        return max(0, min(of_kind, of_all))

    def _publish(self, job_ids: Sequence[str]) -> None:
        if not job_ids:
            return
        try:
            self._queue.publish_hints([(job_id, 0) for job_id in job_ids])
        except QueueError as error:
            logger.warning("%s; the reaper will publish %d jobs", error, len(job_ids))
            return
        self._repository.mark_published(job_ids)
