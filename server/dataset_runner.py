"""Works off datasets: makes jobs of their clips a portion at a time, and records what came of them.

Any number of runners may run at once, and each may be killed at any moment. Whoever works on a dataset has claimed it,
every portion is one transaction under that claim, and what is known of a clip is its row: a clip has a job or not yet.
Nothing is kept in memory between two portions.
"""

import itertools
import logging

from server.bulk_runner import BulkRunner
from server.datasets.files import DatasetFiles
from server.datasets.model import DatasetStatus
from server.datasets.repository import DatasetRecord, DatasetRepository
from server.jobs.database import Database
from server.jobs.queue import JobQueue
from server.jobs.repository import JobRepository
from server.keys.limits import Limits
from server.objects import objects_of
from server.settings import Settings

__all__ = ["DatasetRunner", "make_dataset_runner"]

logger = logging.getLogger(__name__)

_SUBMIT_CLIPS = 200
_SETTLE_CLIPS = 200
_REMOVE_JOBS = 200
_LOOK_CLIPS = 500


def make_dataset_runner(settings: Settings, *, database: Database, queue: JobQueue) -> "DatasetRunner":
    """A runner as the settings have it, on this database and queue."""
    limits = Limits.of(settings)
    return DatasetRunner(
        settings,
        datasets=DatasetRepository(database, lease_s=settings.lease_s, limits=limits),
        files=DatasetFiles(objects_of(settings, "datasets")),
        repository=JobRepository(database, lease_s=settings.lease_s, max_attempts=settings.max_attempts, limits=limits),
        queue=queue,
    )


class DatasetRunner(BulkRunner):
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
        super().__init__(settings, kind="dataset", orders=datasets, repository=repository, queue=queue)
        self._datasets, self._files = datasets, files

    def remove_orphans(self, *, older_than_s: float) -> int:
        """Remove files of attempts that came to nothing, and of datasets that have gone; returns their number."""
        removed = self._files.objects.sweep_unfinished(older_than_s=24 * older_than_s)
        old = (found for found in self._files.files() if found.age_s > older_than_s)
        for dataset_id, of_dataset in itertools.groupby(old, key=lambda found: found.dataset_id):
            while portion := list(itertools.islice(of_dataset, _LOOK_CLIPS)):
                attempts = self._datasets.known_attempts(dataset_id, [found.job_id for found in portion])
                for found in portion:
                    if found.is_partial or attempts.get(found.job_id, 0) not in (None, found.attempt):
                        self._files.discard(found)
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
