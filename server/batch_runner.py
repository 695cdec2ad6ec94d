"""Works off batches: checks their files, makes jobs of their lines a portion at a time, and writes what came of them.

Any number of runners may run at once, and each may be killed at any moment. Whoever works on a batch has claimed it,
every portion is one transaction under that claim, and what is known of a line is its row: a line is submitted once
or not yet. Nothing is kept in memory between two portions.
"""

import itertools
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

from sqlalchemy.exc import SQLAlchemyError

from server.api.batch_lines import answer_line, read_line
from server.api.fields import order_of
from server.batches.model import BatchStatus
from server.batches.repository import (
    BatchClaim,
    BatchRecord,
    BatchRepository,
    CheckedLine,
    FinishedFile,
    PendingLine,
    SubmittedLine,
    input_in_use,
)
from server.bulk_runner import BulkRunner
from server.checkpoints import Catalogue
from server.errors import RequestRefusedError, ServiceError
from server.files.model import new_file_id
from server.files.repository import FileRepository
from server.files.service import FileService
from server.files.store import FileStore, FoundFile
from server.jobs.bulk import PRIORITY, ClaimLostError
from server.jobs.database import Database
from server.jobs.queue import JobQueue
from server.jobs.repository import JobRepository
from server.jobs.service import JobService
from server.keys.limits import Limits
from server.objects import objects_of
from server.sealing import Sealer
from server.settings import Settings
from server.sources.repository import SourceRepository
from server.sources.service import SourceService
from server.storage import ArtifactStore
from server.webhooks.signature import seal_secret

__all__ = ["BatchRunner", "make_batch_runner"]

logger = logging.getLogger(__name__)

MAX_LINES = 50_000
MAX_PROBLEMS = 100
"""A file with more of them is not read any further."""
_CHECK_LINES, _CHECK_BYTES = 2000, 16 * 2**20
_SUBMIT_LINES = 500
_RESULT_LINES = 500
_SETTLE_LINES = 1000
_HOLD_LOOKS = 5
_REMOVE_FILES = 100


class BatchRunner(BulkRunner):
    """Looks at all batches again and again.

    Args:
        settings: Intervals and limits.
        jobs: Resolves what a line asks for, by the same rules as a request.
        sources: The same for lines that begin with a picture or video.
        queue: Told of the jobs that were made.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        batches: BatchRepository,
        files: FileRepository,
        store: FileStore,
        jobs: JobService,
        sources: SourceService,
        repository: JobRepository,
        queue: JobQueue,
    ) -> None:
        super().__init__(settings, kind="batch", orders=batches, repository=repository, queue=queue)
        self._batches, self._files, self._store = batches, files, store
        self._jobs, self._sources = jobs, sources
        self._held_until: dict[int, float] = {}
        """Of batches whose tenant has used up a quota: when it is worth to look again, of the steady clock."""

    def tidy(self) -> None:
        """Remove the bytes of files that were deleted or have expired, and those that no row names."""
        try:
            gone = self._files.removable(in_use=input_in_use(), limit=_REMOVE_FILES)
            for file_id in gone:
                self._store.remove(file_id)
            self._files.mark_removed(gone)
        except (SQLAlchemyError, OSError) as error:
            logger.warning("files that are gone are removed later: %s", error)

    def remove_orphans(self, *, older_than_s: float) -> int:
        """Remove files that no row names and that nobody has written to for a while; returns their number."""
        removed = self._store.objects.sweep_unfinished(older_than_s=24 * older_than_s)
        old = (file for file in self._store.files() if file.age_s > older_than_s)
        while batch := list(itertools.islice(old, _REMOVE_FILES)):
            removed += self._remove_unknown(batch)
        return removed

    def _remove_unknown(self, files: Sequence[FoundFile]) -> int:
        known = self._files.known([file.file_id for file in files])
        removed = 0
        for file in files:
            if file.file_id not in known or file.is_partial:
                self._store.discard(file)
                removed += 1
        return removed

    def _advance(self, seq: int, *, share: int) -> bool:
        """One portion of work on a batch, at most ``share`` new jobs; returns whether there is more to do at once."""
        claim = self._batches.claim(seq)
        if claim is None:
            return False
        try:
            status = claim.batch.status
            if status is BatchStatus.FINALIZING or status is BatchStatus.CANCELLING:
                return self._end(claim)
            if claim.is_overdue:
                self._batches.begin_end(claim, expired=True)
                return True
            if status is BatchStatus.VALIDATING:
                return self._validate(claim)
            return self._work(claim, share=share)
        finally:
            self._batches.release(claim)

    # -- validating ------------------------------------------------------------------------------------------

    def _validate(self, claim: BatchClaim) -> bool:
        batch = claim.batch
        try:
            file = self._store.open(batch.input_file_id)
        except FileNotFoundError:
            self._batches.end_validation(claim, [_problem("input_file_missing", "The input file is gone.")])
            return True
        with file:
            file.seek(batch.checked_bytes)
            return self._check_portion(claim, file)

    def _check_portion(self, claim: BatchClaim, file: BinaryIO) -> bool:
        batch = claim.batch
        number, position = batch.checked_lines, batch.checked_bytes
        room = MAX_PROBLEMS - len(batch.errors or [])
        found: dict[str, CheckedLine] = {}
        problems: list[dict[str, Any]] = []
        is_end = False
        limit = self._settings.max_body_bytes
        while number - batch.checked_lines < _CHECK_LINES and position - batch.checked_bytes < _CHECK_BYTES:
            raw = file.readline(limit + 1)
            if not raw:
                is_end = True
                break
            number += 1
            begin, position = position, position + len(raw)
            if len(raw) > limit:
                message = f"The line has more than the {limit} bytes allowed."
                problems.append(_problem("line_too_long", message, line=number))
                is_end = True  # where the next one begins is not worth looking for
                break
            if not raw.strip():
                continue
            try:
                custom_id = read_line(raw, endpoint=batch.endpoint).custom_id
            except RequestRefusedError as error:
                problems.append(_problem(error.code, error.message, param=error.param, line=number))
            else:
                if custom_id in found:
                    problems.append(_duplicate(custom_id, number, found[custom_id].line))
                else:
                    found[custom_id] = CheckedLine(number, custom_id, begin, len(raw))
            if len(problems) >= room:
                break
        for custom_id, first in self._batches.same_custom_ids(claim, list(found)).items():
            problems.append(_duplicate(custom_id, found.pop(custom_id).line, first))
        problems.sort(key=lambda one: int(one["line"]))
        is_end |= len(problems) >= room
        total = batch.total + len(found)
        if total > MAX_LINES:
            problems.append(_problem("too_many_lines", f"The file has more than the {MAX_LINES} lines allowed."))
            is_end = True
        elif len(problems) >= room:
            problems[room:] = [_problem("too_many_problems", "There may be more: the rest of the file was not read.")]
        elif is_end and not total and not problems and not batch.errors:
            problems.append(_problem("empty_file", "The file has no lines."))
        self._batches.add_checked(claim, list(found.values()), problems, checked_lines=number, checked_bytes=position)
        if is_end:
            self._batches.end_validation(claim)
        return True

    # -- in progress -----------------------------------------------------------------------------------------

    def _work(self, claim: BatchClaim, *, share: int) -> bool:
        outstanding = self._batches.settle(claim, limit=_SETTLE_LINES)
        room = min(share, self._room(), _SUBMIT_LINES)
        lines = self._batches.pending(claim, limit=max(1, room))
        if not lines:
            if outstanding:
                return False
            self._batches.begin_end(claim, expired=False)
            return True
        if room <= 0 or time.monotonic() < self._held_until.get(claim.batch.seq, 0.0):
            return False
        if claim.batch.seq in self._held_until:
            lines = lines[:1]  # is there room again?
        submitted = self._resolve(claim.batch, lines)
        wanted = [line.job for line in submitted if line.job is not None]
        job_ids: list[str] = []
        try:
            job_ids = self._batches.submit(claim, submitted)
        finally:
            self._discard(wanted[len(job_ids) :])
        self._publish(job_ids)
        if len(job_ids) < len(wanted):  # a quota of the tenant is used up
            self._held_until[claim.batch.seq] = time.monotonic() + _HOLD_LOOKS * self._settings.batch_interval_s
        else:
            self._held_until.pop(claim.batch.seq, None)
        # Where the first waits for a quota, nothing was done.
        return bool(job_ids) or bool(submitted and submitted[0].job is None)

    def _discard(self, jobs: Sequence[dict[str, Any]]) -> None:
        """Remove what was kept for jobs that were not made; they will be resolved anew."""
        for job in jobs:
            if job.get("source_id") is not None:
                try:
                    self._sources.discard(job["source_id"])
                except (SQLAlchemyError, OSError) as error:
                    logger.warning("a source is left to the sweeper: %s", error)

    def _resolve(self, batch: BatchRecord, lines: Sequence[PendingLine]) -> list[SubmittedLine]:
        """What becomes of these lines; ends early where the server can take no more at the moment."""
        resolved = []
        with self._store.open(batch.input_file_id) as file:
            for line in lines:
                file.seek(line.begin)
                try:
                    request = read_line(file.read(line.length), endpoint=batch.endpoint)
                    order, source = order_of(request.body)
                    if order.priority is None:
                        order = replace(order, priority=PRIORITY)
                    if source is None:
                        job = self._jobs.resolve(batch.tenant, order)
                    else:
                        job = self._sources.resolve_beginning(batch.tenant, order, source)
                except ServiceError as error:
                    if error.status_code >= 429:
                        logger.info("%s waits at line %d: %s", batch.id, line.line, error.message)
                        break
                    refusal = {"status_code": error.status_code, "body": error.body()}
                    resolved.append(SubmittedLine(line.line, None, refusal))
                else:
                    resolved.append(SubmittedLine(line.line, job, None))
        return resolved

    def _end(self, claim: BatchClaim) -> bool:
        """Stop what is not done, and write the files once all of it has stopped."""
        batch = claim.batch
        if batch.status is BatchStatus.CANCELLING:
            end = BatchStatus.CANCELLED
        else:
            end = BatchStatus.COMPLETED if batch.expired_at is None else BatchStatus.EXPIRED
        outstanding = self._batches.settle(claim, limit=_SETTLE_LINES)
        if outstanding:
            for job_id in self._batches.submitted_jobs(claim):
                self._repository.request_cancel(job_id)
            return self._batches.settle(claim, limit=_SETTLE_LINES) == 0
        if batch.in_progress_at is None:
            self._batches.drop_lines(claim)
        self._write(claim, end)
        return True

    def _write(self, claim: BatchClaim, end: BatchStatus) -> None:
        batch = claim.batch
        output_id, error_id = new_file_id(), new_file_id()
        counts = {True: 0, False: 0}
        published: list[str] = []
        try:
            with ExitStack() as stack:
                writers = {
                    True: stack.enter_context(self._store.writer(output_id)),
                    False: stack.enter_context(self._store.writer(error_id)),
                }
                after = 0
                while results := self._batches.results(claim, after_line=after, limit=_RESULT_LINES):
                    for result in results:
                        line = answer_line(batch.id, result, end=end)
                        writers[line.is_output].write(line.text)
                        counts[line.is_output] += 1
                    after = results[-1].line
                    self._batches.renew(claim)
                finished: dict[bool, FinishedFile | None] = {True: None, False: None}
                for is_output, file_id, name in ((True, output_id, "output"), (False, error_id, "error")):
                    if counts[is_output]:
                        published.append(file_id)
                        written = writers[is_output].publish()
                        filename = f"{batch.id}_{name}.jsonl"
                        finished[is_output] = FinishedFile(file_id, filename, written, counts[is_output])
            self._batches.finish(claim, end, output=finished[True], error=finished[False])
        except ClaimLostError:
            for file_id in published:
                self._store.remove(file_id)
            raise
        logger.info("%s is %s: %d lines done, %d not", batch.id, end.value, counts[True], counts[False])


def make_batch_runner(settings: Settings, *, database: Database, catalogue: Catalogue, queue: JobQueue) -> BatchRunner:
    """A runner on one database and data folder."""
    repository = JobRepository(database, lease_s=settings.lease_s, max_attempts=settings.max_attempts)
    files, store = FileRepository(database), FileStore(objects_of(settings, "files"))
    artifacts = ArtifactStore(objects_of(settings, "artifacts"))
    jobs = JobService(
        repository,
        catalogue,
        artifacts,
        publish=lambda job_id: None,  # the runner publishes what it has made itself
        max_queued=settings.max_queued_jobs,
        min_free_bytes=settings.min_free_bytes,
        seal=partial(seal_secret, Sealer(settings)),
        private_hosts=settings.webhook_private_hosts,
    )
    sources = SourceService(
        SourceRepository(database),
        FileStore(objects_of(settings, "sources")),
        jobs=jobs,
        files=FileService(files, store, min_free_bytes=settings.min_free_bytes),
        artifacts=artifacts,
        max_bytes=settings.max_body_bytes,
    )
    return BatchRunner(
        settings,
        batches=BatchRepository(database, lease_s=settings.lease_s, limits=Limits.of(settings)),
        files=files,
        store=store,
        jobs=jobs,
        sources=sources,
        repository=repository,
        queue=queue,
    )


def _problem(code: str, message: str, *, param: str | None = None, line: int | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": param, "line": line}


def _duplicate(custom_id: str, line: int, first: int) -> dict[str, Any]:
    message = f"custom_id: {custom_id[:80]!r} is that of line {first} already"
    return _problem("duplicate_custom_id", message, param="custom_id", line=line)
