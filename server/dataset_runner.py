"""Works off datasets: makes jobs of their clips a portion at a time, and records what came of them.

Any number of runners may run at once, and each may be killed at any moment. Whoever works on a dataset has claimed it,
every portion is one transaction under that claim, and what is known of a clip is its row: a clip has a job or not yet.
Nothing is kept in memory between two portions.
"""

import logging
import threading
import time
from collections.abc import Sequence

from sqlalchemy.exc import SQLAlchemyError

from server.datasets.files import DatasetFiles
from server.datasets.model import DatasetStatus
from server.datasets.repository import ClaimLostError, DatasetRecord, DatasetRepository
from server.jobs.database import Database
from server.jobs.queue import JobQueue, QueueError
from server.jobs.repository import JobRepository
from server.keys.limits import Limits
from server.settings import Settings

__all__ = ["DatasetRunner", "make_dataset_runner"]

logger = logging.getLogger(__name__)

_SUBMIT_CLIPS = 200
_SETTLE_CLIPS = 200
_REMOVE_JOBS = 200
_LEAST_QUEUED = 8
"""Jobs that may wait whatever the pace: else a start from rest would never come about."""
_ORPHAN_S = 3600.0
"""Nobody is still making a clip whose file has lain there for so long without becoming part of a dataset."""


def make_dataset_runner(settings: Settings, *, database: Database, queue: JobQueue) -> "DatasetRunner":
    """A runner as the settings have it, on this database and queue."""
    limits = Limits.of(settings)
    return DatasetRunner(
        settings,
        datasets=DatasetRepository(database, lease_s=settings.lease_s, limits=limits),
        files=DatasetFiles(settings.datasets_dir),
        repository=JobRepository(database, lease_s=settings.lease_s, max_attempts=settings.max_attempts, limits=limits),
        queue=queue,
    )


class DatasetRunner:
    """Looks at all datasets again and again.

    Args:
        settings: Intervals and limits.
        queue: Told of the jobs that were made.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        datasets: DatasetRepository,
        files: DatasetFiles,
        repository: JobRepository,
        queue: JobQueue,
    ) -> None:
        self._settings = settings
        self._datasets, self._files = datasets, files
        self._repository, self._queue = repository, queue
        self._next_scan = 0.0  # of the steady clock

    def run(self, stop: threading.Event) -> None:
        """Work until ``stop`` is set. An outage of database, broker or disk is waited out."""
        while not stop.is_set():
            try:
                moved = self.look()
                if time.monotonic() >= self._next_scan:
                    self._next_scan = time.monotonic() + self._settings.orphan_scan_s
                    self.remove_orphans(older_than_s=_ORPHAN_S)
            except Exception:  # whatever it is, datasets go on when it is over
                logger.exception("datasets: a look failed")
                moved = False
            if not moved:
                stop.wait(self._settings.batch_interval_s)

    def look(self) -> bool:
        """Do one portion of work on each dataset; returns whether there is more to do at once."""
        moved = False
        try:
            room = self._room()
            active = self._datasets.with_work(has_room=room > 0)
        except SQLAlchemyError as error:
            logger.warning("datasets: %s", error)
            return False
        for seq in active:
            try:
                moved |= self._advance(seq, share=-(-room // len(active)))
            except ClaimLostError as error:
                logger.info("%s is not what it was: cancelled, deleted, or worked on by another", error)
            except (SQLAlchemyError, OSError) as error:
                logger.warning("dataset %d waits: %s", seq, error)
        return moved

    def remove_orphans(self, *, older_than_s: float) -> int:
        """Remove files of attempts that came to nothing, and of datasets that have gone; returns their number."""
        removed = 0
        for dataset_id in self._files.datasets():
            old = [path for path in self._files.files(dataset_id) if time.time() - path.stat().st_mtime > older_than_s]
            for begin in range(0, len(old), 500):
                portion = old[begin : begin + 500]
                keep = self._datasets.known_files(dataset_id, [path.name.partition(".")[0] for path in portion])
                for path in portion:
                    if path.name.partition(".")[0] not in keep or path.suffix == ".part":
                        path.unlink(missing_ok=True)
                        removed += 1
        return removed

    def _advance(self, seq: int, *, share: int) -> bool:
        claim = self._datasets.claim(seq)
        if claim is None:
            return False
        try:
            if claim.deleted_at is not None:
                return self._remove(claim)
            settled = self._datasets.settle(claim, limit=_SETTLE_CLIPS)
            if claim.status is DatasetStatus.CANCELLING:
                jobs = self._datasets.submitted_jobs(claim, limit=_SETTLE_CLIPS)
                for job_id in jobs:
                    self._repository.request_cancel(job_id)
                return not self._datasets.finish(claim) and bool(jobs or settled)
            if self._datasets.finish(claim):
                logger.info("%s is completed", claim.id)
                return True
            limit = min(share, self._room(), _SUBMIT_CLIPS)
            job_ids = self._datasets.submit(claim, limit=limit) if limit > 0 else []
            self._publish(job_ids)
            return bool(job_ids) or settled == _SETTLE_CLIPS
        finally:
            self._datasets.release(claim)

    def _remove(self, claim: DatasetRecord) -> bool:
        """Remove a portion of what belongs to a deleted dataset. Whether there is more."""
        jobs = self._datasets.all_jobs(claim, limit=_REMOVE_JOBS)
        for job_id in jobs:
            self._repository.request_removal(job_id)  # their files and rows are removed by the reaper
        if len(jobs) == _REMOVE_JOBS:
            return True
        self._datasets.forget(claim)
        self._files.remove_all(claim.id)
        logger.info("%s has gone", claim.id)
        return True

    def _room(self) -> int:
        """Number of jobs that datasets may make now, so that other requests are not kept waiting by them."""
        settings = self._settings
        pace = self._repository.count_done(within_s=settings.batch_queued_s, limit=settings.batch_queued_jobs)
        of_datasets = min(settings.batch_queued_jobs, max(_LEAST_QUEUED, pace)) - self._datasets.waiting_jobs()
        of_all = settings.max_queued_jobs // 2 - self._repository.count_waiting()
        return max(0, min(of_datasets, of_all))

    def _publish(self, job_ids: Sequence[str]) -> None:
        published = []
        try:
            for job_id in job_ids:
                self._queue.publish(job_id, 0)
                published.append(job_id)
        except QueueError as error:
            logger.warning("%s; the reaper will publish %d jobs", error, len(job_ids) - len(published))
        self._repository.mark_published(published)
