"""Keeps jobs moving when something was lost: a worker, a message, the broker and all it held.

Any number of reapers may run at once: each change is one conditional UPDATE, and a message too many is harmless.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from server.events.log import EventLog
from server.files.store import FileStore
from server.jobs.queue import MOST_HINTS, JobQueue, QueueError
from server.jobs.repository import JobRepository, log_fields
from server.jobs.workers import WorkerRegistry
from server.logs import bound
from server.settings import Settings
from server.sources.repository import SourceRepository
from server.storage import ArtifactStore, StoredFile
from server.tracing import record
from server.webhooks.repository import WebhookRepository

__all__ = ["Reaper"]

T = TypeVar("T")
logger = logging.getLogger(__name__)
_BATCH = 500
_UNUSED_S = 3600.0
_LIVE_KEPT_S = 600.0
_UNFINISHED_S = 86_400.0


class Reaper:
    """Sweeps over the job table.

    Args:
        settings: Intervals and limits.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        repository: JobRepository,
        workers: WorkerRegistry,
        store: ArtifactStore,
        queue: JobQueue,
        events: EventLog,
        sources: SourceRepository,
        source_store: FileStore,
        webhooks: WebhookRepository,
    ) -> None:
        self._settings, self._events, self._webhooks = settings, events, webhooks
        self._sources, self._source_store = sources, source_store
        self._repository, self._workers, self._store, self._queue = repository, workers, store, queue
        self._next_scan = 0.0  # of the steady clock
        self._stop = threading.Event()
        self._urgent = (self._settle_expired, self._publish, self._end_lives, self._remove_deleted)

    def run(self, stop: threading.Event) -> None:
        """Sweep until ``stop`` is set. An outage of the database or broker is waited out.

        Tidying has a thread of its own: it lists all that is kept, and no lost job is to wait for that.
        """
        self._stop = stop
        with ThreadPoolExecutor(1, thread_name_prefix="tidy") as threads:
            tidying = threads.submit(self._repeat, self._tidy)
            tidying.add_done_callback(lambda _: stop.set())  # what nobody expected ends all of it
            try:
                self._repeat(*self._urgent)
            finally:
                stop.set()
        tidying.result()

    def sweep(self) -> None:
        """Do everything once. A part that fails does not hold up the others."""
        for part in (*self._urgent, self._tidy):
            self._do(part)

    def _repeat(self, *parts: Callable[[], None]) -> None:
        while not self._stop.is_set():
            for part in parts:
                self._do(part)
            self._stop.wait(self._settings.reaper_interval_s)

    def _do(self, part: Callable[[], None]) -> None:
        try:
            part()
        except (SQLAlchemyError, QueueError, OSError) as error:
            logger.warning("%s: %s", part.__name__.strip("_"), error)

    def _settle_expired(self) -> None:
        result = self._repository.sweep_expired()
        for job in result.jobs:
            now = time.time()
            about: dict[str, str | int | float | bool | None] = {
                "medsora.job_id": job.id,
                "medsora.attempt": job.attempt,
                "medsora.outcome": job.status.value,
            }
            record("lease ran out", parent=job.traceparent, began_s=now, ended_s=now, error="lost", attributes=about)
            with bound(**log_fields(job)):
                logger.warning("the lease of %s ran out in attempt %d: it is %s now", job.id, job.attempt, job.status)

    def _publish(self) -> None:
        settings = self._settings
        self._publish_all(self._repository.unpublished(grace_s=settings.publish_grace_s, limit=_BATCH))
        # Messages can vanish with the broker's memory or with a worker that had just taken one. As long as there
        # is one, whoever takes it sees all jobs that wait, and nothing is published again.
        if self._queue.length() == 0:
            self._publish_all(self._repository.stale_published(after_s=settings.republish_after_s, limit=MOST_HINTS))

    def _publish_all(self, jobs: Sequence[tuple[str, int]]) -> None:
        if not jobs:
            return
        self._queue.publish_hints(jobs)
        self._repository.mark_published([job_id for job_id, _ in jobs])
        logger.info("published %d jobs again", len(jobs))

    def _end_lives(self) -> None:
        while count := self._repository.expire(kept_s=self._settings.video_kept_s, limit=_BATCH):
            logger.info("the time of %d videos is over", count)

    def _remove_deleted(self) -> None:
        jobs = self._repository.removable(limit=_BATCH)
        for job in jobs:
            self._store.remove_attempts(job.id)
        if jobs:
            self._repository.forget([job.id for job in jobs])

    def _tidy(self) -> None:
        if time.monotonic() < self._next_scan:
            return
        self._next_scan = time.monotonic() + self._settings.orphan_scan_s
        self._workers.drop_dead()
        while self._events.sweep(kept_s=self._settings.events_kept_s, max_rows=self._settings.events_max_rows):
            pass
        self._webhooks.sweep(kept_s=self._settings.webhook_kept_s)
        # Younger files may belong to a claim that the table does not show yet, or not any more.
        old = (file for file in self._until_stop(self._store.files()) if file.age_s > 2 * self._settings.lease_s)
        removed = 0
        while batch := list(itertools.islice(old, _BATCH)):
            removed += self._remove_orphans(batch)
        removed += self._remove_sources()
        for objects in (self._store.objects, self._source_store.objects):
            removed += objects.sweep_unfinished(older_than_s=_UNFINISHED_S)
        if removed:
            logger.info("removed %d files that belong to no job", removed)

    def _until_stop(self, files: Iterable[T]) -> Iterator[T]:
        """Files of a store, which may be millions; no more of them once this is to stop."""
        return itertools.takewhile(lambda _: not self._stop.is_set(), files)

    def _remove_sources(self) -> int:
        """Remove what no job is made from any more; younger than an hour it may be about to be."""
        removed = 0
        while gone := self._sources.forget_unused(older_than_s=_UNUSED_S, limit=_BATCH):
            for source_id in gone:
                self._source_store.remove(source_id)
            removed += len(gone)
        # after a crash between the two there are bytes without a row
        old = (file for file in self._until_stop(self._source_store.files()) if file.age_s > _UNUSED_S)
        while batch := list(itertools.islice(old, _BATCH)):
            known = self._sources.known([file.file_id for file in batch])
            for file in batch:
                if file.file_id not in known or file.is_partial:
                    self._source_store.discard(file)
                    removed += 1
        return removed

    def _remove_orphans(self, files: list[StoredFile]) -> int:
        owners = self._repository.referenced([file.job_id for file in files])
        removed = 0
        for file in files:
            artifact, attempt_at_work = owners.get(file.job_id, (None, None))
            is_published = file.video == artifact and not file.is_partial
            if file.is_live and file.age_s > _LIVE_KEPT_S:
                is_published = False  # whoever still follows it has it open
            if not is_published and file.attempt != attempt_at_work:
                self._store.remove(file.name)
                removed += 1
        return removed
