"""All queries of batches and their lines. Each method is one transaction.

Whoever works on a batch has a claim. Each of its transactions first checks, and prolongs, that claim: a claim that
another has taken over, or a batch that has been cancelled meanwhile, lets the whole transaction fail.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)

from server.batches.model import ACTIVE, WINDOWS_S, Batch, BatchLine, BatchStatus, LineState, new_batch_id
from server.events.log import emit
from server.files.model import File
from server.files.repository import insert_file
from server.files.store import WrittenFile
from server.idempotency import note_made
from server.jobs.bulk import AT_END, QUEUE_SHARE, ClaimLostError
from server.jobs.database import Database, database_now
from server.jobs.intake import insert_jobs
from server.jobs.model import Job, JobStatus
from server.jobs.repository import JobRecord, job_record
from server.keys.limits import NO_LIMITS, Limits, fitting

__all__ = [
    "BatchClaim",
    "BatchRecord",
    "BatchRepository",
    "CheckedLine",
    "FinishedFile",
    "LineResult",
    "PendingLine",
    "SubmittedLine",
    "TooManyBatchesError",
    "input_in_use",
]

_BATCH: Any = Batch.__table__
_LINE: Any = BatchLine.__table__
_JOB: Any = Job.__table__
_ENTERED_AT = {
    BatchStatus.IN_PROGRESS: "in_progress_at",
    BatchStatus.FINALIZING: "finalizing_at",
    BatchStatus.COMPLETED: "completed_at",
    BatchStatus.FAILED: "failed_at",
    BatchStatus.CANCELLING: "cancelling_at",
    BatchStatus.CANCELLED: "cancelled_at",
}


class TooManyBatchesError(Exception):
    """As many batches are unfinished as may be."""


@dataclass(frozen=True, kw_only=True)
class BatchRecord:
    """A row of the batch table, detached; the columns are described in :class:`server.batches.model.Batch`."""

    seq: int
    id: str
    tenant: str
    status: BatchStatus
    endpoint: str
    input_file_id: str
    completion_window: str
    output_expires_after_s: int | None
    metadata: dict[str, str] | None
    token: int
    lease_until: float | None
    checked_lines: int
    checked_bytes: int
    total: int
    completed: int
    failed: int
    errors: list[dict[str, Any]] | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: float
    expires_at: float
    in_progress_at: float | None
    finalizing_at: float | None
    completed_at: float | None
    failed_at: float | None
    expired_at: float | None
    cancelling_at: float | None
    cancelled_at: float | None


@dataclass(frozen=True)
class BatchClaim:
    """The right to work on a batch until the lease runs out."""

    batch: BatchRecord
    is_overdue: bool
    """Whether the completion window was over when it was claimed."""


@dataclass(frozen=True)
class CheckedLine:
    """A line of the file that has the right form: its number from 1, the byte where it begins, and its bytes."""

    line: int
    custom_id: str
    begin: int
    length: int


@dataclass(frozen=True)
class PendingLine:
    """A line that is to be submitted."""

    line: int
    begin: int
    length: int


@dataclass(frozen=True)
class SubmittedLine:
    """What became of a line: the columns of its job, or the answer that refuses it (status_code and body)."""

    line: int
    job: dict[str, Any] | None
    refusal: dict[str, Any] | None


@dataclass(frozen=True)
class LineResult:
    """A line at the end of its batch; ``job`` is None when it never had one, or when that is gone."""

    line: int
    custom_id: str
    has_job: bool
    job: JobRecord | None
    refusal: dict[str, Any] | None


@dataclass(frozen=True)
class FinishedFile:
    """An output or error file whose bytes are on disk, and the number of lines in it."""

    file_id: str
    filename: str
    written: WrittenFile
    lines: int


class BatchRepository:
    """Storage of batches on one database. Safe to use from several threads.

    Args:
        lease_s: Seconds a claim lasts without renewal.
    """

    def __init__(self, database: Database, *, lease_s: float, limits: Limits = NO_LIMITS) -> None:
        self._database = database
        self._lease_s = lease_s
        self._limits = limits

    # -- clients ---------------------------------------------------------------------------------------------

    def add(
        self,
        *,
        tenant: str,
        endpoint: str,
        input_file_id: str,
        completion_window: str,
        output_expires_after_s: int | None,
        metadata: dict[str, str] | None,
        max_active: int,
    ) -> BatchRecord:
        """Insert a batch that is to be validated; it is on disk when this returns.

        Args:
            max_active: Most batches of a tenant that may be unfinished, this one included.

        Raises:
            TooManyBatchesError: That many are.
        """
        active = select(func.count()).where(Batch.tenant == tenant, Batch.status.in_(ACTIVE))
        with self._database.write() as connection:
            if (connection.scalar(active) or 0) >= max_active:
                raise TooManyBatchesError
            statement = insert(_BATCH).values(
                id=new_batch_id(),
                tenant=tenant,
                status=BatchStatus.VALIDATING.value,
                endpoint=endpoint,
                input_file_id=input_file_id,
                completion_window=completion_window,
                output_expires_after_s=output_expires_after_s,
                metadata=metadata,
                token=0,
                checked_lines=0,
                checked_bytes=0,
                total=0,
                completed=0,
                failed=0,
                created_at=database_now(),
                expires_at=database_now() + WINDOWS_S[completion_window],
            )
            batch = _record(connection.execute(statement.returning(*_BATCH.c)).one())
            note_made(connection, batch.id)
            _announce(connection, batch)
        return batch

    def get(self, tenant: str, batch_id: str) -> BatchRecord | None:
        """The batch, or None when this tenant has none of that id."""
        with self._database.read() as connection:
            row = connection.execute(select(_BATCH).where(Batch.id == batch_id, Batch.tenant == tenant)).one_or_none()
        return None if row is None else _record(row)

    def page(self, tenant: str, *, limit: int, after: str | None) -> tuple[list[BatchRecord], bool] | None:
        """Batches behind the cursor ``after``, newest first, and whether there are more; None: no such cursor."""
        query = select(_BATCH).where(Batch.tenant == tenant)
        with self._database.read() as connection:
            if after is not None:
                cursor = connection.scalar(select(Batch.seq).where(Batch.id == after, Batch.tenant == tenant))
                if cursor is None:
                    return None
                query = query.where(Batch.seq < cursor)
            rows = connection.execute(query.order_by(Batch.seq.desc()).limit(limit + 1)).all()
        return [_record(row) for row in rows[:limit]], len(rows) > limit

    def request_cancel(self, tenant: str, batch_id: str) -> BatchRecord | None:
        """Let a batch come to its end unless it is at it already; None when this tenant has none of that id."""
        open_ = Batch.status.in_((BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS))
        statement = update(_BATCH).where(Batch.id == batch_id, Batch.tenant == tenant, open_)
        statement = statement.values(_entered(BatchStatus.CANCELLING)).returning(*_BATCH.c)
        with self._database.write() as connection:
            row = connection.execute(statement).one_or_none()
            if row is not None:
                _announce(connection, _record(row))
        return self.get(tenant, batch_id)

    # -- the process that works on them ----------------------------------------------------------------------

    def with_work(self, *, has_room: bool) -> list[int]:
        """Numbers of all batches with something to do now, oldest first: a look at them costs no write.

        Args:
            has_room: Whether lines could be submitted.
        """
        pending = exists().where(BatchLine.batch_seq == Batch.seq, BatchLine.state == LineState.PENDING)
        submitted = exists().where(BatchLine.batch_seq == Batch.seq, BatchLine.state == LineState.SUBMITTED)
        ended = (
            select(BatchLine.line)
            .join(Job, Job.id == BatchLine.job_id, isouter=True)
            .where(BatchLine.batch_seq == Batch.seq, BatchLine.state == LineState.SUBMITTED, AT_END)
            .exists()
        )
        all_done = ~pending & ~submitted
        due = [Batch.status != BatchStatus.IN_PROGRESS, Batch.expires_at <= database_now(), ended, all_done]
        if has_room:
            due.append(pending)
        query = select(Batch.seq).where(Batch.status.in_(ACTIVE), or_(*due)).order_by(Batch.seq)
        with self._database.read() as connection:
            return list(connection.scalars(query))

    def claim(self, seq: int) -> BatchClaim | None:
        """Take a batch with something to do that nobody works on; None when it is not to be had."""
        free = or_(Batch.lease_until.is_(None), Batch.lease_until < database_now())
        statement = (
            update(_BATCH)
            .where(Batch.seq == seq, Batch.status.in_(ACTIVE), free)
            .values(token=Batch.token + 1, lease_until=database_now() + self._lease_s)
            .returning(*_BATCH.c, (Batch.expires_at <= database_now()).label("is_overdue"))
        )
        with self._database.write() as connection:
            row = connection.execute(statement).one_or_none()
        if row is None:
            return None
        values = dict(row._mapping)
        is_overdue = bool(values.pop("is_overdue"))
        return BatchClaim(_record_of(values), is_overdue)

    def release(self, claim: BatchClaim) -> None:
        """Let others have the batch."""
        mine = and_(Batch.seq == claim.batch.seq, Batch.token == claim.batch.token)
        with self._database.write() as connection:
            connection.execute(update(Batch).where(mine).values(lease_until=None))

    def renew(self, claim: BatchClaim) -> None:
        """Prolong the claim.

        Raises:
            ClaimLostError: It does not stand any more.
        """
        with self._database.write() as connection:
            self._hold(connection, claim)

    def same_custom_ids(self, claim: BatchClaim, custom_ids: Sequence[str]) -> dict[str, int]:
        """Those of the ids that earlier lines have, and these lines' numbers."""
        query = select(BatchLine.custom_id, BatchLine.line)
        query = query.where(BatchLine.batch_seq == claim.batch.seq, BatchLine.custom_id.in_(custom_ids))
        with self._database.read() as connection:
            return {row.custom_id: row.line for row in connection.execute(query)}

    def add_checked(
        self,
        claim: BatchClaim,
        lines: Sequence[CheckedLine],
        problems: Sequence[dict[str, Any]],
        *,
        checked_lines: int,
        checked_bytes: int,
    ) -> BatchRecord:
        """Record a part of the file as looked at: up to line ``checked_lines``, byte ``checked_bytes``.

        Raises:
            ClaimLostError: The claim does not stand any more.
        """
        with self._database.write() as connection:
            batch = self._hold(connection, claim)
            if lines:
                rows = [
                    {
                        "batch_seq": batch.seq,
                        "line": line.line,
                        "custom_id": line.custom_id,
                        "begin": line.begin,
                        "length": line.length,
                        "state": LineState.PENDING.value,
                    }
                    for line in lines
                ]
                connection.execute(insert(_LINE), rows)
            values = {
                "checked_lines": checked_lines,
                "checked_bytes": checked_bytes,
                "total": batch.total + len(lines),
                "errors": [*(batch.errors or []), *problems] or None,
            }
            return self._change(connection, batch, values)

    def end_validation(self, claim: BatchClaim, problems: Sequence[dict[str, Any]] = ()) -> BatchRecord:
        """Begin with the work, or end the batch as failed when there are problems, now or from before.

        Raises:
            ClaimLostError: The claim does not stand any more.
        """
        with self._database.write() as connection:
            batch = self._hold(connection, claim)
            problems = [*(batch.errors or []), *problems]
            if not problems:
                return self._change(connection, batch, _entered(BatchStatus.IN_PROGRESS))
            connection.execute(delete(_LINE).where(BatchLine.batch_seq == batch.seq))
            values = {**_entered(BatchStatus.FAILED), "errors": problems, "total": 0, "lease_until": None}
            return self._change(connection, batch, values)

    def pending(self, claim: BatchClaim, *, limit: int) -> list[PendingLine]:
        """The next lines to be submitted, in the order of the file."""
        query = select(BatchLine.line, BatchLine.begin, BatchLine.length).where(
            BatchLine.batch_seq == claim.batch.seq, BatchLine.state == LineState.PENDING
        )
        with self._database.read() as connection:
            return [PendingLine(*row) for row in connection.execute(query.order_by(BatchLine.line).limit(limit))]

    def waiting_jobs(self) -> int:
        """Number of jobs of batches that wait for a worker."""
        of_batch = exists().where(BatchLine.job_id == Job.id)
        query = select(func.count()).select_from(Job).where(Job.status == JobStatus.QUEUED, of_batch)
        with self._database.read() as connection:
            return connection.scalar(query) or 0

    def unfinished_clips(self) -> int:
        """Number of lines that are to be made and have no end yet, of all batches that were not cancelled."""
        left = func.sum(Batch.total - Batch.completed - Batch.failed)
        query = select(left).where(Batch.status.in_([BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS]))
        with self._database.read() as connection:
            return int(connection.scalar(query) or 0)

    def submit(self, claim: BatchClaim, lines: Sequence[SubmittedLine]) -> list[str]:
        """Make the jobs of these lines, and record those that were refused: all of them, or none.

        Lines from the first on whose job would go over a quota of the tenant stay as they are. So that the tenant can
        ask for something else meanwhile, batches take half of its places in the queue.

        Returns:
            Ids of the jobs.

        Raises:
            ClaimLostError: The claim does not stand any more.
        """
        with self._database.write() as connection:
            batch = self._hold(connection, claim)
            wanted = [(line, line.job) for line in lines if line.job is not None]
            fit = fitting(connection, batch.tenant, [job for _, job in wanted], self._limits, queue_share=QUEUE_SHARE)
            if fit.quota is not None:
                lines = [line for line in lines if line.line < wanted[fit.num_jobs][0].line]
                wanted = wanted[: fit.num_jobs]
            job_ids = insert_jobs(connection, [job for _, job in wanted])
            made = dict(zip((line.line for line, _ in wanted), job_ids, strict=True))
            changes = [
                {
                    "at": line.line,
                    "state": (LineState.FAILED if line.job is None else LineState.SUBMITTED).value,
                    "job_id": made.get(line.line),
                    "refusal": line.refusal,
                }
                for line in lines
            ]
            if changes:
                statement = update(_LINE).where(
                    _LINE.c.batch_seq == batch.seq,
                    _LINE.c.line == bindparam("at"),
                    _LINE.c.state == LineState.PENDING.value,
                )
                connection.execute(statement, changes)
            refused = len(lines) - len(job_ids)
            self._change(connection, batch, {"failed": batch.failed + refused})
        return job_ids

    def settle(self, claim: BatchClaim, *, limit: int) -> int:
        """Record which submitted lines have come to an end; returns the number of those that have not.

        Raises:
            ClaimLostError: The claim does not stand any more.
        """
        submitted = and_(BatchLine.batch_seq == claim.batch.seq, BatchLine.state == LineState.SUBMITTED)
        succeeded = case((and_(Job.status == JobStatus.SUCCEEDED, Job.deleted_at.is_(None)), 1), else_=0)
        query = (
            select(BatchLine.line, succeeded.label("succeeded"))
            .join(Job, Job.id == BatchLine.job_id, isouter=True)
            .where(submitted, AT_END)
            .limit(limit)
        )
        with self._database.read() as connection:
            ended = connection.execute(query).all()
        if ended:
            with self._database.write() as connection:
                batch = self._hold(connection, claim)
                good = [row.line for row in ended if row.succeeded]
                bad = [row.line for row in ended if not row.succeeded]
                completed = self._end_lines(connection, batch, good, LineState.COMPLETED)
                failed = self._end_lines(connection, batch, bad, LineState.FAILED)
                counts = {"completed": batch.completed + completed, "failed": batch.failed + failed}
                self._change(connection, batch, counts)
        with self._database.read() as connection:
            return connection.scalar(select(func.count()).select_from(BatchLine).where(submitted)) or 0

    def _end_lines(self, connection: Connection, batch: BatchRecord, lines: list[int], state: LineState) -> int:
        if not lines:
            return 0
        statement = update(BatchLine).where(
            BatchLine.batch_seq == batch.seq, BatchLine.line.in_(lines), BatchLine.state == LineState.SUBMITTED
        )
        return connection.execute(statement.values(state=state.value)).rowcount

    def submitted_jobs(self, claim: BatchClaim) -> list[str]:
        """Ids of the jobs whose end has not been seen."""
        query = select(BatchLine.job_id).where(
            BatchLine.batch_seq == claim.batch.seq, BatchLine.state == LineState.SUBMITTED
        )
        with self._database.read() as connection:
            return [job_id for job_id in connection.scalars(query) if job_id is not None]

    def begin_end(self, claim: BatchClaim, *, expired: bool) -> BatchRecord:
        """Go over to finalizing: all lines are done, or the window is over.

        Raises:
            ClaimLostError: The claim does not stand any more.
        """
        values = _entered(BatchStatus.FINALIZING)
        if expired:
            values["expired_at"] = database_now()
        with self._database.write() as connection:
            return self._change(connection, self._hold(connection, claim), values)

    def drop_lines(self, claim: BatchClaim) -> None:
        """Forget the lines of a batch that ends before it began: nothing was submitted, and not all of it is known.

        Raises:
            ClaimLostError: The claim does not stand any more.
        """
        with self._database.write() as connection:
            batch = self._hold(connection, claim)
            connection.execute(delete(_LINE).where(BatchLine.batch_seq == batch.seq))
            self._change(connection, batch, {"total": 0})

    def results(self, claim: BatchClaim, *, after_line: int, limit: int) -> list[LineResult]:
        """What came of the lines after ``after_line``, in the order of the file."""
        columns = [_LINE.c.line, _LINE.c.custom_id, _LINE.c.job_id.label("its_job"), _LINE.c.refusal]
        query: Select[Any] = (
            select(*columns, *(column.label(f"job_{column.name}") for column in _JOB.c))
            .join(_JOB, and_(_JOB.c.id == _LINE.c.job_id, _JOB.c.deleted_at.is_(None)), isouter=True)
            .where(_LINE.c.batch_seq == claim.batch.seq, _LINE.c.line > after_line)
            .order_by(_LINE.c.line)
            .limit(limit)
        )
        results = []
        with self._database.read() as connection:
            for row in connection.execute(query):
                mapping = row._mapping
                job = None
                if mapping["job_id"] is not None:
                    job = job_record({column.name: mapping[f"job_{column.name}"] for column in _JOB.c})
                results.append(LineResult(row.line, row.custom_id, row.its_job is not None, job, row.refusal))
        return results

    def finish(
        self, claim: BatchClaim, status: BatchStatus, *, output: FinishedFile | None, error: FinishedFile | None
    ) -> BatchRecord:
        """End a batch with its files, which hold all lines.

        Raises:
            ClaimLostError: The claim does not stand any more.
        """
        with self._database.write() as connection:
            batch = self._hold(connection, claim)
            for file in (output, error):
                if file is not None:
                    insert_file(
                        connection,
                        file_id=file.file_id,
                        tenant=batch.tenant,
                        purpose="batch_output",
                        filename=file.filename,
                        written=file.written,
                        expires_after_s=batch.output_expires_after_s,
                    )
            connection.execute(delete(_LINE).where(BatchLine.batch_seq == batch.seq))
            values = {
                **_entered(status),
                "completed": 0 if output is None else output.lines,
                "failed": 0 if error is None else error.lines,
                "total": sum(file.lines for file in (output, error) if file is not None),
                "output_file_id": None if output is None else output.file_id,
                "error_file_id": None if error is None else error.file_id,
                "lease_until": None,
            }
            return self._change(connection, batch, values)

    def _hold(self, connection: Connection, claim: BatchClaim) -> BatchRecord:
        """Prolong the claim within a transaction; nobody can take it over until that ends."""
        batch = claim.batch
        mine = and_(Batch.seq == batch.seq, Batch.token == batch.token, Batch.status == batch.status)
        statement = update(_BATCH).where(mine).values(lease_until=database_now() + self._lease_s).returning(*_BATCH.c)
        row = connection.execute(statement).one_or_none()
        if row is None:
            raise ClaimLostError(batch.id)
        return _record(row)

    def _change(self, connection: Connection, batch: BatchRecord, values: dict[str, Any]) -> BatchRecord:
        statement = update(_BATCH).where(Batch.seq == batch.seq).values(values).returning(*_BATCH.c)
        changed = _record(connection.execute(statement).one())
        if changed.status is not batch.status:
            _announce(connection, changed)
        elif (changed.completed, changed.failed) != (batch.completed, batch.failed):
            _announce(connection, changed, kind="batch.progress")
        return changed


def input_in_use() -> ColumnElement[bool]:
    """True of files that an unfinished batch still reads."""
    return exists().where(Batch.input_file_id == File.id, Batch.status.in_(ACTIVE))


def _announce(connection: Connection, batch: BatchRecord, *, kind: str | None = None) -> None:
    """Tell what has become of a batch to those who follow events: its new state, or how far it is."""
    data: dict[str, Any] = {
        "id": batch.id,
        "status": batch.status.value,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
    }
    told = f"batch.{batch.status.value}" if kind is None else kind
    emit(connection, tenant=batch.tenant, kind=told, subject=batch.id, data=data, passing=kind is not None)


def _entered(status: BatchStatus) -> dict[str, Any]:
    values: dict[str, Any] = {"status": status.value}
    if status in _ENTERED_AT:
        values[_ENTERED_AT[status]] = database_now()
    return values


def _record(row: Any) -> BatchRecord:
    return _record_of(dict(row._mapping))


def _record_of(values: dict[str, Any]) -> BatchRecord:
    return BatchRecord(**{**values, "status": BatchStatus(values["status"])})
