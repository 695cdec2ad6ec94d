"""All queries of the job table. Each method is one transaction; each change of state is one conditional UPDATE, and
the rows that it changed are announced (``server/events``) in the same transaction. What is neither state nor told to
anybody, such as a renewed lease, is written without waiting for the disk: a crash of the database may undo it, and then
the lease runs out where it is not renewed once more.

A claim raises ``attempt``, and that number is the fencing token: whoever wants to change a running job must
name it, and is told no (False, None) once somebody else has claimed the job. Times are compared inside the
database with its own clock, never with the clock of a worker or API host.
"""

import enum
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from typing import Any
from weakref import WeakValueDictionary

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Double,
    Update,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    true,
    tuple_,
    update,
)

from server import tracing
from server.events.jobs import announce_deletion, announce_preview, announce_progress, announce_states
from server.jobs.database import Database, database_now, lock_rows
from server.jobs.group_commit import GroupCommit
from server.jobs.intake import COUNT_WAITING, Order, take_orders
from server.jobs.measures import BATCH_SIZE, measure_claimed, measure_ended
from server.jobs.model import (
    ALIKE,
    IS_QUEUED,
    TERMINAL,
    DeletedJob,
    Job,
    JobStatus,
    WorkerProcess,
)
from server.jobs.sharing import CLAIMABLE, LOCKABLE, charge, lock_alike, lock_first, places
from server.jobs.waiting import Outlook, outlook
from server.keys.limits import NO_LIMITS, Limits
from server.measures import Observation, add_observations

__all__ = [
    "Claim",
    "FinishedWork",
    "JobRecord",
    "JobRepository",
    "Removal",
    "SweepResult",
    "job_record",
    "log_fields",
]

_TABLE: Any = Job.__table__
_HIDDEN = Job.deleted_at.is_not(None)
_VISIBLE = Job.deleted_at.is_(None)
# Put together once: clients that wait ask again and again.
_ANY_JOB = select(_TABLE).where(Job.id == bindparam("wanted_id"), _VISIBLE)
_ANY_JOB_OF = _ANY_JOB.where(Job.tenant == bindparam("wanted_tenant"))
_TERMINAL_NAMES = sorted(status.value for status in TERMINAL)
EXHAUSTED = "attempts_exhausted"
CANCELLED = "cancelled"
CANCELLED_MESSAGE = "The job was cancelled."
_PLACES_TOLD = 10_000
_SWEPT_AT_ONCE = 10_000
CURSOR_KEPT_S = 86_400.0
"""Seconds for which a deleted job still serves as a cursor into the list."""


class Removal(enum.Enum):
    """What :meth:`JobRepository.request_removal` found."""

    MISSING = "missing"
    READY = "ready"
    """No worker holds it: its file can go now."""
    RUNNING = "running"
    """Its worker has been asked to stop."""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A row of the job table, detached; the columns are described in :class:`server.jobs.model.Job`."""

    seq: int
    id: str
    tenant: str
    status: JobStatus
    model: str
    prompt: str
    label: str
    seed: int
    num_frames: int
    width: int
    height: int
    fps: float
    seconds: str
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    remixed_from: str | None
    source_kind: str | None
    source_id: str | None
    source_video: str | None
    prefix_frames: int
    strength: float
    priority: int
    deterministic: bool
    attempt: int
    handed_back: int
    lease_until: float | None
    worker: str | None
    steps_done: int
    cancel_requested: bool
    deleted_at: float | None
    error_code: str | None
    error_message: str | None
    request_id: str | None
    traceparent: str | None
    artifact: str | None
    size_bytes: int | None
    sha256: str | None
    thumbnail_sha256: str | None
    spritesheet_sha256: str | None
    created_at: float
    published_at: float | None
    queued_at: float
    started_at: float | None
    completed_at: float | None
    sampling_s: float | None
    encode_s: float | None
    store_s: float | None
    webhook_url: str | None
    batch_size: int | None
    webhook_secret: str | None = field(repr=False)
    previews_until: float | None
    expires_at: float | None


@dataclass(frozen=True)
class Claim:
    """The right to work on a job until the lease runs out. ``token`` is the fencing token."""

    job: JobRecord
    token: int
    taken_at: float = field(default_factory=time.time)
    """Unix seconds of this machine: for traces alone, never compared with a lease."""


@dataclass(frozen=True, kw_only=True)
class FinishedWork:
    """What a worker reports of a finished clip; durations in seconds of its steady clock."""

    artifact: str
    size_bytes: int
    sha256: str
    thumbnail_sha256: str | None = None
    spritesheet_sha256: str | None = None
    sampling_s: float
    encode_s: float
    store_s: float
    batch_size: int = 1


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """Numbers of jobs whose lease had run out, by what became of them."""

    requeued: int
    exhausted: int
    canceled: int
    jobs: list[JobRecord]
    """As they are now."""


class JobRepository:
    """Storage of jobs on one database. Safe to use from several threads.

    Whatever a client asks for names its ``tenant``, and then there are no jobs but that tenant's. The server's own
    parts name none and see all.

    Args:
        lease_s: Seconds a claim lasts without renewal.
        max_attempts: Claims a job may use up before it fails.
        limits: What each tenant may have that has no limits of its own.
    """

    def __init__(self, database: Database, *, lease_s: float, max_attempts: int, limits: Limits = NO_LIMITS) -> None:
        self._database = database
        self._lease_s = lease_s
        self._max_attempts = max_attempts
        self._limits = limits
        self._groups: WeakValueDictionary[str, GroupCommit[Order, Any]] = WeakValueDictionary()
        self._finding_group = threading.Lock()

    # -- clients ---------------------------------------------------------------------------------------------

    def add(self, values: dict[str, Any], *, max_queued: int) -> JobRecord:
        """Insert a job that waits, with those that others ask for at the same time; it is on disk when this returns.

        Args:
            values: The columns of what was asked.
            max_queued: Most jobs that may wait, this one included.

        Raises:
            QueueFullError: That many wait already.
            QuotaReachedError: The tenant may have no more of it.
        """
        order = Order(values, max_queued)
        # Only where there is one writer anyway does a tenant wait for what another one locks.
        whose = "" if self._database.is_sqlite else order.job["tenant"]
        with self._finding_group:
            group = self._groups.get(whose)
            if group is None:
                group = self._groups[whose] = GroupCommit(self._take_orders)
        return _record(group(order))

    def _take_orders(self, orders: Sequence[Order]) -> list[Any]:
        with self._database.write() as connection:
            return take_orders(connection, orders, self._limits)

    def get(self, job_id: str, *, tenant: str | None = None) -> JobRecord | None:
        """The job, or None when there is none that a client may see."""
        about = {"wanted_id": job_id, "wanted_tenant": tenant}
        with self._database.read() as connection:
            row = connection.execute(_ANY_JOB if tenant is None else _ANY_JOB_OF, about).one_or_none()
        return None if row is None else _record(row)

    def page(
        self, *, limit: int, after: str | None, newest_first: bool, tenant: str | None = None
    ) -> tuple[list[JobRecord], bool] | None:
        """Jobs behind the cursor ``after``, and whether there are more; None when no job has that id.

        A job that was deleted lately still serves as a cursor.
        """
        query = select(_TABLE).where(_VISIBLE)
        if tenant is not None:
            query = query.where(Job.tenant == tenant)
        with self._database.read() as connection:
            if after is not None:
                cursor = connection.scalar(select(Job.seq).where(*_one(after, tenant)))
                if cursor is None:
                    cursor = connection.scalar(select(DeletedJob.seq).where(*_one(after, tenant, DeletedJob)))
                if cursor is None:
                    return None
                query = query.where(Job.seq < cursor if newest_first else Job.seq > cursor)
            order = Job.seq.desc() if newest_first else Job.seq.asc()
            rows = connection.execute(query.order_by(order).limit(limit + 1)).all()
        return [_record(row) for row in rows[:limit]], len(rows) > limit

    def outlook(self, job: JobRecord) -> Outlook:
        """How it stands with an unfinished job."""
        with self._database.read() as connection:
            return outlook(connection, job)

    def want_previews(self, job_ids: Collection[str], tenants: Collection[str], *, for_s: float) -> None:
        """Let workers show previews of these unfinished jobs, and of all of these tenants, for a while."""
        meant = and_(Job.status.not_in(_TERMINAL_NAMES), or_(Job.id.in_(job_ids), Job.tenant.in_(tenants)))
        with self._database.write(is_durable=False) as connection:
            in_order = select(Job.seq).where(meant).order_by(Job.seq).with_for_update()
            connection.execute(update(Job).where(Job.seq.in_(in_order)).values(previews_until=database_now() + for_s))

    def queue_places(
        self, job_ids: Collection[str], tenants: Collection[str], *, limit: int
    ) -> list[tuple[JobRecord, int]]:
        """Waiting jobs among these and of these tenants, with their places in the order of claims, from 1.

        Args:
            limit: Most of them; jobs behind the first 10,000 of the queue are left out.
        """
        waits = Job.cancel_requested.is_(False)
        meant = and_(_VISIBLE, or_(Job.id.in_(job_ids), Job.tenant.in_(tenants)))
        query = select(_TABLE).where(IS_QUEUED, waits, meant).order_by(Job.seq).limit(limit)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
            order = places(connection, [waits], limit=_PLACES_TOLD) if rows else []
        place_of = {job_id: place for place, job_id in enumerate(order, start=1)}
        return sorted(((_record(row), place_of[row.id]) for row in rows if row.id in place_of), key=itemgetter(1))

    def request_cancel(self, job_id: str, *, tenant: str | None = None) -> bool:
        """Cancel a job that waits, ask the worker of one that runs. False when it is neither."""
        it = and_(*_one(job_id, tenant))
        with self._database.write() as connection:
            if _cancel_waiting(connection, it):
                return True
            statement = update(Job).where(it, Job.status == JobStatus.RUNNING, _VISIBLE)
            return connection.execute(statement.values(cancel_requested=True)).rowcount == 1

    def request_removal(self, job_id: str, *, tenant: str | None = None) -> Removal:
        """Hide a job for good, and cancel it unless it is finished."""
        it = and_(*_one(job_id, tenant), _VISIBLE)
        with self._database.write() as connection:
            _cancel_waiting(connection, it)
            statement = (
                update(_TABLE).where(it).values(deleted_at=database_now(), cancel_requested=True).returning(*_TABLE.c)
            )
            row = connection.execute(statement).one_or_none()
            if row is None:
                return Removal.MISSING
            announce_deletion(connection, row)
        return Removal.RUNNING if row.status == JobStatus.RUNNING else Removal.READY

    # -- workers ---------------------------------------------------------------------------------------------

    def claim(self, job_id: str, *, worker: str) -> Claim | None:
        """Take a job that waits, or whose worker has let its lease run out; None when it is not to be had."""
        query = LOCKABLE.where(Job.id == job_id, or_(IS_QUEUED, _abandoned()), *CLAIMABLE)
        with self._database.write() as connection:
            row = connection.execute(query, self._tries).one_or_none()
            claims = [] if row is None else self._take(connection, [row], worker)
        return claims[0] if claims else None

    def claim_next(self, *, worker: str, most: Callable[[JobRecord], int]) -> list[Claim]:
        """Take the job that is next (see ``sharing.py``) and others that can be sampled together with it.

        A job whose worker has let its lease run out comes before all that wait: it was its turn already.

        Args:
            most: How many may be sampled together with a job, itself included.
        """
        with self._database.read() as connection:  # nobody waits for this one, most often
            if all(connection.scalar(query, self._tries) is None for query in _LOOKS):
                return []
        with self._database.write() as connection:
            first = connection.execute(_LOCK_LOST, self._tries).one_or_none()
            first = first or lock_first(connection, **self._tries)
            if first is None:
                return []
            rows, limit = [first], 1 if first.runs_alone else most(_locked_record(first))
            if limit > 1:
                rows += lock_alike(connection, _alike(first), limit=limit - 1, first=first, **self._tries)
            return self._take(connection, rows, worker)

    def claim_alike(self, job: JobRecord, *, worker: str, most: int) -> list[Claim]:
        """Take up to ``most`` waiting jobs that can be sampled together with this one."""
        with self._database.write() as connection:
            return self._take(connection, lock_alike(connection, _alike(job), limit=most, **self._tries), worker)

    @property
    def _tries(self) -> dict[str, int]:
        """Parameters of ``CLAIMABLE``."""
        return {"max_attempts": self._max_attempts}

    def _take(self, connection: Connection, locked: Sequence[Any], worker: str) -> list[Claim]:
        """Claim jobs whose rows the transaction has locked."""
        if not locked:
            return []
        order = {row.seq: place for place, row in enumerate(locked)}
        values = {"seqs": list(order), "lease_s": self._lease_s, "by": worker}
        rows = sorted(connection.execute(_CLAIM, values).all(), key=lambda row: order[row.seq])
        charge(connection, rows)
        measure_claimed(connection, rows)
        _tell(connection, rows)
        return [Claim(_record(row), row.attempt) for row in rows]

    def renew(self, job_id: str, token: int, *, steps_done: int, announce: bool = False) -> bool | None:
        """:meth:`renew_all` for one claim: whether cancellation was asked for; None when the claim is lost."""
        return self.renew_all({(job_id, token): steps_done}, announce=announce).get(job_id)

    def renew_all(self, progress: Mapping[tuple[str, int], int], *, announce: bool = False) -> dict[str, bool]:
        """Prolong leases and record progress, all in one transaction.

        Args:
            progress: Steps that are done of each job, by its id and token.
            announce: Whether to tell the progress to those who follow the jobs.

        Returns:
            Of each claim that still stands, whether cancellation was asked for.
        """
        by_steps: dict[int, list[tuple[str, int]]] = {}
        for claim, steps_done in progress.items():
            by_steps.setdefault(steps_done, []).append(claim)
        rows: list[Any] = []
        # What is told has a place in the log, which must never come to mean another event: it may not be undone.
        with self._database.write(is_durable=announce) as connection:
            _lock_jobs(connection, [job_id for job_id, _ in progress])
            for steps_done, claims in by_steps.items():
                statement = (
                    update(_TABLE)
                    .where(*_all_held(claims))
                    .values(lease_until=database_now() + self._lease_s, steps_done=steps_done)
                    .returning(*(_TABLE.c if announce else (_TABLE.c.id, _TABLE.c.cancel_requested)))
                )
                rows += connection.execute(statement).all()
            answers = {row.id: bool(row.cancel_requested) for row in rows}
            if announce:  # last: see server/events/log.py
                announce_progress(connection, rows)
        return answers

    def previews_wanted(self, job_ids: Collection[str]) -> set[str]:
        """Those of these jobs whose previews somebody looks at now."""
        query = select(Job.id).where(Job.id.in_(job_ids), Job.previews_until > database_now())
        with self._database.read() as connection:
            return set(connection.scalars(query))

    def show_preview(self, job_id: str, token: int, image: bytes, *, steps_done: int) -> None:
        """Tell what a job will look like, if the claim still stands.

        Args:
            image: WebP.
            steps_done: After which the picture was taken.
        """
        with self._database.write() as connection:
            row = connection.execute(select(_TABLE).where(*_held(job_id, token))).one_or_none()
            if row is not None:
                announce_preview(connection, row, image, steps_done=steps_done)

    def succeed(self, job_id: str, token: int, work: FinishedWork) -> bool:
        """:meth:`succeed_all` for one job: False when its result is not published."""
        return job_id in self.succeed_all([(job_id, token, work)])

    def succeed_all(self, finished: Sequence[tuple[str, int, FinishedWork]]) -> set[str]:
        """Publish results (id, token, work), all in one transaction.

        Returns:
            Ids of the published ones. Of the others the claim is lost, or cancellation was asked for.
        """
        rows: list[Any] = []
        with self._database.write() as connection:
            _lock_jobs(connection, [job_id for job_id, _, _ in finished])
            for job_id, token, work in finished:
                rows += connection.execute(_SUCCEED, {**asdict(work), "of": job_id, "token": token}).all()
            _tell(connection, rows)
        return {row.id for row in rows}

    def fail(self, job_id: str, token: int, *, code: str, message: str) -> bool:
        """End the job with an error. False when the claim is lost."""
        return self._end(job_id, token, JobStatus.FAILED, code, message)

    def finish_cancel(self, job_id: str, token: int) -> bool:
        """Confirm that the work has stopped. False when the claim is lost."""
        return self._end(job_id, token, JobStatus.CANCELED, CANCELLED, CANCELLED_MESSAGE)

    def hand_back(self, job_id: str, token: int) -> bool:
        """:meth:`hand_back_all` for one job. False when the claim is lost or cancellation was asked for."""
        return job_id in self.hand_back_all([(job_id, token)])

    def hand_back_all(self, claims: Sequence[tuple[str, int]], *, uses_attempt: bool = False) -> dict[str, JobStatus]:
        """Let other workers have these jobs at once.

        Args:
            claims: Ids and tokens.
            uses_attempt: Whether this claim counts against the cap of attempts. Where it was the last, the job fails.

        Returns:
            What became of each. Of those that are missing the claim is lost, or cancellation was asked for.
        """
        waiting = {**_waiting(), "handed_back": Job.handed_back + (0 if uses_attempt else 1)}
        exhausted = [(~self._attempts_left(), self._exhausted())] if uses_attempt else []
        held = and_(*_all_held(claims), Job.cancel_requested.is_(False))
        with self._database.write() as connection:
            _lock_jobs(connection, [job_id for job_id, _ in claims])
            rows = [row for rows in _settle(connection, held, [*exhausted, (true(), waiting)]) for row in rows]
            _tell(connection, rows)
        return {row.id: JobStatus(row.status) for row in rows}

    def count_batch(self, model: str, size: int) -> None:
        """Count a batch that has been sampled."""
        with self._database.write(is_durable=False) as connection:
            add_observations(connection, [Observation(BATCH_SIZE, (model,), size)])

    def _end(self, job_id: str, token: int, status: JobStatus, code: str, message: str) -> bool:
        statement = update(Job).where(*_held(job_id, token)).values(**_ended(status, code, message))
        with self._database.write() as connection:
            return _change(connection, statement) == 1

    # -- reaper and publishers -------------------------------------------------------------------------------

    def sweep_expired(self) -> SweepResult:
        """Settle every running job whose lease has run out: canceled, failed for good, or waiting again.

        One that somebody is at just now, and may renew or end, is left to the next sweep.
        """
        query = select(Job.seq).where(_abandoned()).order_by(Job.seq).limit(_SWEPT_AT_ONCE)
        changes = (
            (Job.cancel_requested.is_(True), _ended(JobStatus.CANCELED, CANCELLED, CANCELLED_MESSAGE)),
            (~self._attempts_left(), self._exhausted()),
            (true(), _waiting()),
        )
        with self._database.write() as connection:
            seqs = lock_rows(connection, query, skip_locked=True)
            expired = and_(Job.seq.in_(seqs), Job.status == JobStatus.RUNNING)
            settled = _settle(connection, expired, changes)
            _tell(connection, [row for rows in settled for row in rows])
        canceled, exhausted, requeued = map(len, settled)
        jobs = [_record(row) for rows in settled for row in rows]
        return SweepResult(requeued=requeued, exhausted=exhausted, canceled=canceled, jobs=jobs)

    def unpublished(self, *, grace_s: float, limit: int) -> list[tuple[str, int]]:
        """Oldest waiting jobs whose id never reached the broker: (id, attempts so far).

        Args:
            grace_s: Leave out jobs that were accepted more recently: their API is about to publish them. Jobs
                that wait again after an attempt have nobody to publish them and are always included.
        """
        overdue = or_(Job.attempt > 0, Job.queued_at < database_now() - grace_s)
        return self._waiting_ids(and_(Job.published_at.is_(None), overdue), limit)

    def stale_published(self, *, after_s: float, limit: int) -> list[tuple[str, int]]:
        """Oldest waiting jobs whose id was published longer than ``after_s`` seconds ago."""
        return self._waiting_ids(Job.published_at < database_now() - after_s, limit)

    def mark_published(self, job_ids: Iterable[str]) -> None:
        """Record that the broker has been given these ids."""
        ids = list(job_ids)
        if ids:
            query = select(Job.seq).where(Job.id.in_(ids), Job.status == JobStatus.QUEUED).order_by(Job.seq)
            with self._database.write(is_durable=False) as connection:
                # one that somebody is at is being claimed, cancelled or marked
                seqs = lock_rows(connection, query, skip_locked=True)
                connection.execute(update(Job).where(Job.seq.in_(seqs)).values(published_at=database_now()))

    def forget_published(self) -> None:
        """Let all waiting jobs be published again: the broker that was told of them has lost its memory."""
        statement = update(Job).where(Job.status == JobStatus.QUEUED, Job.published_at.is_not(None))
        with self._database.write() as connection:
            connection.execute(statement.values(published_at=None))

    def begin_anew(self) -> int:
        """After a restore, where no worker runs: let all running jobs wait again, which costs them no attempt, and be
        published. Those whose cancellation was asked for are left to the reaper.

        Returns:
            How many were running.
        """
        running = and_(Job.status == JobStatus.RUNNING, Job.cancel_requested.is_(False))
        with self._database.write() as connection:
            connection.execute(delete(WorkerProcess))
            again = update(_TABLE).where(running).values(handed_back=Job.handed_back + 1, **_waiting())
            changed = connection.execute(again.returning(*_TABLE.c)).all()
            connection.execute(update(Job).where(Job.status == JobStatus.QUEUED).values(published_at=None))
            _tell(connection, changed)
        return len(changed)

    def count_waiting(self) -> int:
        """Number of jobs in the queue."""
        with self._database.read() as connection:
            return connection.scalar(COUNT_WAITING) or 0

    def count_live(self) -> dict[tuple[str, JobStatus], int]:
        """Numbers of jobs that wait and of those that a worker holds, by model and state."""
        live = Job.status.in_([JobStatus.QUEUED.value, JobStatus.RUNNING.value])
        query = select(Job.model, Job.status, func.count()).where(live).group_by(Job.status, Job.model)
        with self._database.read() as connection:
            return {(model, JobStatus(status)): count for model, status, count in connection.execute(query)}

    def count_done(self, *, within_s: float, limit: int) -> int:
        """Number of videos made in the last ``within_s`` seconds, counted up to ``limit``."""
        newest = select(Job.completed_at).where(Job.status == JobStatus.SUCCEEDED).order_by(Job.seq.desc()).limit(limit)
        done = newest.subquery()
        query = select(func.count()).select_from(done).where(done.c.completed_at > database_now() - within_s)
        with self._database.read() as connection:
            return connection.scalar(query) or 0

    def expire(self, *, kept_s: float | None, limit: int) -> int:
        """Delete finished jobs whose time has come, as a client would; returns how many.

        Args:
            kept_s: Seconds that jobs are kept after their end, for those that do not know it yet; None: for ever.
        """
        at_end = (Job.status.in_(_TERMINAL_NAMES), _VISIBLE)
        due = select(Job.seq).where(*at_end, Job.expires_at <= database_now()).order_by(Job.expires_at).limit(limit)
        due = due.with_for_update(skip_locked=True)
        with self._database.write() as connection:
            if kept_s is not None:
                unknown = update(Job).where(*at_end, Job.expires_at.is_(None))
                connection.execute(unknown.values(expires_at=Job.completed_at + kept_s))
            statement = update(_TABLE).where(Job.seq.in_(due), *at_end).values(deleted_at=database_now())
            rows = connection.execute(statement.returning(*_TABLE.c)).all()
            for row in rows:
                announce_deletion(connection, row)
        return len(rows)

    def removable(self, *, limit: int) -> list[JobRecord]:
        """Deleted jobs that no worker holds any more."""
        query = select(_TABLE).where(_HIDDEN, Job.status.in_(_TERMINAL_NAMES)).limit(limit)
        with self._database.read() as connection:
            return [_record(row) for row in connection.execute(query)]

    def referenced(self, job_ids: Sequence[str]) -> dict[str, tuple[str | None, int | None]]:
        """For each id that has a row: its artifact, and the token that is at work on it now (else None)."""
        query = select(Job.id, Job.artifact, Job.status, Job.attempt).where(Job.id.in_(job_ids))
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return {row.id: (row.artifact, row.attempt if row.status == JobStatus.RUNNING else None) for row in rows}

    def forget(self, job_ids: Sequence[str]) -> int:
        """Remove the rows of deleted, finished jobs; returns how many. For a day their places in the list stay."""
        removable = and_(Job.id.in_(job_ids), _HIDDEN, Job.status.in_(_TERMINAL_NAMES))
        with self._database.write() as connection:
            # Locked first: nobody else who forgets the same jobs now may keep their places too.
            condition = Job.seq.in_(lock_rows(connection, select(Job.seq).where(removable).order_by(Job.seq)))
            places = select(Job.id, Job.tenant, Job.seq, Job.deleted_at).where(condition)
            connection.execute(insert(DeletedJob).from_select(["id", "tenant", "seq", "deleted_at"], places))
            connection.execute(delete(DeletedJob).where(DeletedJob.deleted_at < database_now() - CURSOR_KEPT_S))
            return connection.execute(delete(Job).where(condition)).rowcount

    def _waiting_ids(self, condition: ColumnElement[bool], limit: int) -> list[tuple[str, int]]:
        query = select(Job.id, Job.attempt).where(IS_QUEUED, condition)
        with self._database.read() as connection:
            return [(row.id, row.attempt) for row in connection.execute(query.order_by(Job.seq).limit(limit))]

    def _attempts_left(self) -> ColumnElement[bool]:
        return Job.attempt - Job.handed_back < self._max_attempts

    def _exhausted(self) -> dict[str, Any]:
        times = "once" if self._max_attempts == 1 else f"{self._max_attempts} times"
        return _ended(JobStatus.FAILED, EXHAUSTED, f"The worker was lost or gave up {times} while running this job.")


def _settle(
    connection: Connection, running: ColumnElement[bool], changes: Iterable[tuple[ColumnElement[bool], dict[str, Any]]]
) -> list[Sequence[Any]]:
    """End the claims on running jobs, each by the first change that it is for; returns the rows that each changed."""
    return [
        connection.execute(update(_TABLE).where(running, which).values(**values).returning(*_TABLE.c)).all()
        for which, values in changes
    ]


def _one(job_id: str, tenant: str | None, table: type[Job] | type[DeletedJob] = Job) -> tuple[ColumnElement[bool], ...]:
    """The job of that id, if it is the tenant's; None: whosever it is."""
    return (table.id == job_id,) if tenant is None else (table.id == job_id, table.tenant == tenant)


def _cancel_waiting(connection: Connection, condition: ColumnElement[bool]) -> bool:
    statement = update(_TABLE).where(condition, Job.status == JobStatus.QUEUED, _VISIBLE)
    ended = _ended(JobStatus.CANCELED, CANCELLED, CANCELLED_MESSAGE)
    return _change(connection, statement.values(**ended)) == 1


def _tell(connection: Connection, rows: Sequence[Any]) -> None:
    """Announce the new states of these jobs, and measure those that have ended."""
    announce_states(connection, rows)
    measure_ended(connection, rows)


def _change(connection: Connection, statement: Update) -> int:
    """Change the state of jobs and announce it; returns how many."""
    rows = connection.execute(statement.returning(*_TABLE.c)).all()
    _tell(connection, rows)
    return len(rows)


def _held(job_id: str | BindParameter[str], token: int | BindParameter[int]) -> tuple[ColumnElement[bool], ...]:
    """The claim still stands. An expired lease that nobody has taken over yet is still good."""
    return (Job.id == job_id, Job.status == JobStatus.RUNNING, Job.attempt == token)


_SUCCEED = (  # and what the work was, whose names are those of the columns
    update(_TABLE)
    .where(*_held(bindparam("of"), bindparam("token")), Job.cancel_requested.is_(False))
    .values(
        status=JobStatus.SUCCEEDED.value,
        steps_done=Job.num_inference_steps,
        completed_at=database_now(),
        lease_until=None,
    )
    .returning(*_TABLE.c)
)


def _abandoned() -> ColumnElement[bool]:
    """The lease has run out, and nobody has taken the job over."""
    return and_(Job.status == JobStatus.RUNNING, Job.lease_until < database_now())


_LOOKS = [select(Job.seq).where(which, *CLAIMABLE).order_by(Job.seq).limit(1) for which in (IS_QUEUED, _abandoned())]
_LOCK_LOST = LOCKABLE.where(_abandoned(), *CLAIMABLE).order_by(Job.seq).limit(1)
_CLAIM = (
    update(_TABLE)
    .where(Job.seq.in_(bindparam("seqs", expanding=True)))
    .values(
        status=JobStatus.RUNNING.value,
        attempt=Job.attempt + 1,
        lease_until=database_now() + bindparam("lease_s", type_=Double),
        worker=bindparam("by"),
        steps_done=0,
        started_at=database_now(),
    )
    .returning(*_TABLE.c)
)


_THESE_JOBS = select(Job.seq).where(Job.id.in_(bindparam("these", expanding=True))).order_by(Job.seq)


def _lock_jobs(connection: Connection, job_ids: Sequence[str]) -> None:
    lock_rows(connection, _THESE_JOBS, {"these": list(job_ids)})


def _all_held(claims: Sequence[tuple[str, int]]) -> tuple[ColumnElement[bool], ...]:
    """As :func:`_held`, for any of these ids and tokens."""
    ids = [job_id for job_id, _ in claims]
    return (Job.id.in_(ids), Job.status == JobStatus.RUNNING, tuple_(Job.id, Job.attempt).in_(list(claims)))


def _alike(job: Any) -> dict[str, Any]:
    return {column.key: getattr(job, column.key) for column in ALIKE}


def _waiting() -> dict[str, Any]:
    return {
        "status": JobStatus.QUEUED.value,
        "lease_until": None,
        "worker": None,
        "steps_done": 0,
        "queued_at": database_now(),
        "published_at": None,
    }


def _ended(status: JobStatus, code: str, message: str) -> dict[str, Any]:
    return {
        "status": status.value,
        "error_code": code,
        "error_message": message[:2000],
        "completed_at": database_now(),
        "lease_until": None,
    }


def log_fields(job: JobRecord) -> dict[str, str | None]:
    """What lines of the log about a job carry, for ``logs.bound``."""
    return {
        "job_id": job.id,
        "tenant": job.tenant,
        "request_id": job.request_id,
        "trace_id": tracing.trace_id(job.traceparent),
    }


def job_record(values: dict[str, Any]) -> JobRecord:
    """The record of a row, given by its columns."""
    return JobRecord(**{**values, "status": JobStatus(values["status"])})


def _locked_record(row: Any) -> JobRecord:
    return job_record({column.name: row._mapping[column] for column in _TABLE.c})


def _record(row: Any) -> JobRecord:
    return job_record(dict(row._mapping))
