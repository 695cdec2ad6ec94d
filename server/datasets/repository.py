"""All queries of datasets and their clips. Each method is one transaction.

Whoever works on a dataset has a claim. Each of its transactions first checks, and prolongs, that claim: a claim that
another has taken over, or a dataset that has been cancelled or deleted meanwhile, lets the whole transaction fail.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import (
    Connection,
    LargeBinary,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    type_coerce,
    update,
)

from server.datasets.model import (
    ACTIVE,
    MAX_CLIPS,
    ClipState,
    Dataset,
    DatasetClip,
    DatasetDrop,
    DatasetPayload,
    DatasetStatus,
    clip_seed,
    new_dataset_id,
    planned_clips,
)
from server.events.log import emit
from server.idempotency import note_made
from server.jobs.bulk import AT_END, FINISHED, PRIORITY, QUEUE_SHARE, ClaimLostError
from server.jobs.database import Database, database_now
from server.jobs.intake import insert_jobs
from server.jobs.model import Job, JobStatus
from server.keys.limits import NO_LIMITS, Limits, fitting

__all__ = [
    "ClipOrder",
    "ClipRecord",
    "DatasetRecord",
    "DatasetRepository",
    "FingerprintRow",
    "TooManyDatasetsError",
]

_DATASET: Any = Dataset.__table__
_CLIP: Any = DatasetClip.__table__
_DROP: Any = DatasetDrop.__table__
_PAYLOAD: Any = DatasetPayload.__table__
_PORTION = 500


class TooManyDatasetsError(Exception):
    """As many datasets are unfinished as may be."""


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """A row of the table of datasets, detached; see :class:`server.datasets.model.Dataset`."""

    seq: int
    id: str
    tenant: str
    status: DatasetStatus
    name: str
    model: str
    model_sha256: str
    format: str
    seed: int
    total: int
    labels: list[dict[str, Any]]
    splits: list[dict[str, Any]]
    settings: dict[str, Any]
    filters: dict[str, Any]
    about: dict[str, Any]
    token: int
    lease_until: float | None
    planned: int
    done: int
    missing: int
    dropped: int
    created_at: float
    ended_at: float | None
    deleted_at: float | None


@dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """A clip and, where it is done, its file; see :class:`DatasetClip` and :class:`DatasetPayload`."""

    number: int
    label: int
    split: int
    state: ClipState
    tries: int
    seed: int
    job_id: str | None
    attempt: int | None
    done_number: int | None
    reason: str | None
    size_bytes: int | None
    parts: list[dict[str, Any]] | None
    frames_sha256: str | None
    measures: dict[str, float] | None


@dataclass(frozen=True, kw_only=True)
class ClipOrder:
    """What the worker of a clip's job is to know."""

    dataset_seq: int
    dataset_id: str
    number: int
    format: str
    """Of the dataset."""
    filters: dict[str, Any]
    modality: str


class FingerprintRow(NamedTuple):
    """The fingerprint of a clip."""

    seq: int
    """Its place: those that come later have higher ones."""
    number: int
    """Of the clip; of several fingerprints of one clip the last counts."""
    fingerprint: bytes


class DatasetRepository:
    """Storage of datasets on one database. Safe to use from several threads.

    Args:
        lease_s: Seconds a claim lasts without renewal.
        limits: What each tenant may have that has no limits of its own.
    """

    def __init__(self, database: Database, *, lease_s: float, limits: Limits = NO_LIMITS) -> None:
        self._database = database
        self._lease_s = lease_s
        self._limits = limits

    # -- clients ---------------------------------------------------------------------------------------------

    def add(self, values: dict[str, Any], *, max_active: int) -> DatasetRecord:
        """Insert a dataset of which nothing is made yet; it is on disk when this returns.

        Args:
            values: The columns of what was asked.
            max_active: Most datasets of the tenant that may be unfinished, this one included.

        Raises:
            TooManyDatasetsError: That many are.
        """
        active = select(func.count()).where(
            Dataset.tenant == values["tenant"], Dataset.status.in_(ACTIVE), Dataset.deleted_at.is_(None)
        )
        with self._database.write() as connection:
            if (connection.scalar(active) or 0) >= max_active:
                raise TooManyDatasetsError
            statement = insert(_DATASET).values(
                id=new_dataset_id(),
                status=DatasetStatus.IN_PROGRESS.value,
                created_at=database_now(),
                token=0,
                planned=0,
                done=0,
                missing=0,
                dropped=0,
                **values,
            )
            dataset = _record(connection.execute(statement.returning(*_DATASET.c)).one())
            note_made(connection, dataset.id)
            _announce(connection, dataset)
        return dataset

    def get(self, tenant: str, dataset_id: str) -> DatasetRecord | None:
        """The dataset, or None when this tenant has none of that id."""
        with self._database.read() as connection:
            row = connection.execute(select(_DATASET).where(*_own(tenant, dataset_id))).one_or_none()
        return None if row is None else _record(row)

    def page(self, tenant: str, *, limit: int, after: str | None) -> tuple[list[DatasetRecord], bool] | None:
        """Datasets behind the cursor ``after``, newest first, and whether there are more; None: no such cursor."""
        query = select(_DATASET).where(Dataset.tenant == tenant, Dataset.deleted_at.is_(None))
        with self._database.read() as connection:
            if after is not None:
                cursor = connection.scalar(select(Dataset.seq).where(*_own(tenant, after)))
                if cursor is None:
                    return None
                query = query.where(Dataset.seq < cursor)
            rows = connection.execute(query.order_by(Dataset.seq.desc()).limit(limit + 1)).all()
        return [_record(row) for row in rows[:limit]], len(rows) > limit

    def request_cancel(self, tenant: str, dataset_id: str) -> DatasetRecord | None:
        """Let a dataset come to its end unless it is at it already; None when this tenant has none of that id."""
        statement = update(_DATASET).where(*_own(tenant, dataset_id), Dataset.status == DatasetStatus.IN_PROGRESS)
        statement = statement.values(status=DatasetStatus.CANCELLING.value).returning(*_DATASET.c)
        with self._database.write() as connection:
            row = connection.execute(statement).one_or_none()
            if row is not None:
                _announce(connection, _record(row))
        return self.get(tenant, dataset_id)

    def request_removal(self, tenant: str, dataset_id: str) -> bool:
        """Hide a dataset for good; all that belongs to it goes afterwards. Whether there was one."""
        statement = update(Dataset).where(*_own(tenant, dataset_id)).values(deleted_at=database_now())
        with self._database.write() as connection:
            return connection.execute(statement).rowcount == 1

    def counts(self, dataset: DatasetRecord) -> list[dict[str, int]]:
        """Of each label, how many clips are in which state: ``queued``, ``running``, ``done``, ``missing`` (and, not
        counted here, those that have no job yet)."""
        state = case(
            (and_(DatasetClip.state == ClipState.SUBMITTED, Job.status == JobStatus.RUNNING), "running"),
            (and_(DatasetClip.state == ClipState.SUBMITTED, Job.status == JobStatus.QUEUED), "queued"),
            (DatasetClip.state == ClipState.SUBMITTED, "settling"),
            else_=DatasetClip.state,
        )
        query = (
            select(DatasetClip.label, state.label("state"), func.count().label("clips"))
            .join(Job, Job.id == DatasetClip.job_id, isouter=True)
            .where(DatasetClip.dataset_seq == dataset.seq)
            .group_by(DatasetClip.label, state)
        )
        found: list[dict[str, int]] = [{} for _ in dataset.labels]
        with self._database.read() as connection:
            for row in connection.execute(query):
                found[row.label][row.state] = row.clips
        return found

    def drop_counts(self, dataset: DatasetRecord) -> dict[str, int]:
        """Number of tries that came to nothing, by reason."""
        query = select(DatasetDrop.code, func.count()).where(DatasetDrop.dataset_seq == dataset.seq)
        with self._database.read() as connection:
            return {row[0]: row[1] for row in connection.execute(query.group_by(DatasetDrop.code))}

    def clips(self, dataset: DatasetRecord, *, after: int = -1, limit: int = _PORTION) -> list[ClipRecord]:
        """Clips with numbers above ``after``, in order, whatever their state."""
        with self._database.read() as connection:
            query = _clips(dataset).where(_CLIP.c.number > after).order_by(_CLIP.c.number).limit(limit)
            return [_clip_record(row) for row in connection.execute(query)]

    def done_clips(
        self, dataset: DatasetRecord, *, first: int = 0, last: int = MAX_CLIPS, split: int | None = None, limit: int
    ) -> list[ClipRecord]:
        """Clips that were done when ``dataset`` was read, with numbers from ``first`` to ``last``, in order."""
        between = _CLIP.c.number.between(first, last)
        query = _clips(dataset).where(between, _CLIP.c.done_number <= dataset.done)
        if split is not None:
            query = query.where(_CLIP.c.split == split)
        with self._database.read() as connection:
            return [_clip_record(row) for row in connection.execute(query.order_by(_CLIP.c.number).limit(limit))]

    def drops(self, dataset: DatasetRecord, *, after: int, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """Tries that came to nothing, behind the place ``after``, oldest first; each with its place."""
        names = ("number", "try_number", "seed", "job_id", "code", "message")
        query = select(_DROP.c.seq, *(_DROP.c[name] for name in names))
        query = query.where(_DROP.c.dataset_seq == dataset.seq, _DROP.c.seq > after).order_by(_DROP.c.seq).limit(limit)
        with self._database.read() as connection:
            return [(row.seq, {name: row._mapping[name] for name in names}) for row in connection.execute(query)]

    # -- the process that works on them ----------------------------------------------------------------------

    def with_work(self, *, has_room: bool) -> list[int]:
        """Numbers of all datasets with something to do now, oldest first: a look at them costs no write.

        Args:
            has_room: Whether jobs could be made.
        """
        of_dataset = DatasetClip.dataset_seq == Dataset.seq
        pending = exists().where(of_dataset, DatasetClip.state == ClipState.PENDING)
        ended = (
            select(DatasetClip.number)
            .join(Job, Job.id == DatasetClip.job_id, isouter=True)
            .where(of_dataset, DatasetClip.state == ClipState.SUBMITTED, AT_END)
            .exists()
        )
        due = [
            Dataset.deleted_at.is_not(None),
            Dataset.status == DatasetStatus.CANCELLING,
            Dataset.done + Dataset.missing == Dataset.total,
            ended,
        ]
        if has_room:
            due += [pending, Dataset.planned < Dataset.total]
        active = or_(Dataset.status.in_(ACTIVE), Dataset.deleted_at.is_not(None))
        with self._database.read() as connection:
            return list(connection.scalars(select(Dataset.seq).where(active, or_(*due)).order_by(Dataset.seq)))

    def claim(self, seq: int) -> DatasetRecord | None:
        """Take a dataset that nobody works on; None when it is not to be had."""
        free = or_(Dataset.lease_until.is_(None), Dataset.lease_until < database_now())
        statement = (
            update(_DATASET)
            .where(Dataset.seq == seq, or_(Dataset.status.in_(ACTIVE), Dataset.deleted_at.is_not(None)), free)
            .values(token=Dataset.token + 1, lease_until=database_now() + self._lease_s)
            .returning(*_DATASET.c)
        )
        with self._database.write() as connection:
            row = connection.execute(statement).one_or_none()
        return None if row is None else _record(row)

    def release(self, claim: DatasetRecord) -> None:
        """Let others have the dataset."""
        with self._database.write() as connection:
            mine = and_(Dataset.seq == claim.seq, Dataset.token == claim.token)
            connection.execute(update(Dataset).where(mine).values(lease_until=None))

    def waiting_jobs(self) -> int:
        """Number of jobs of datasets that wait for a worker."""
        of_dataset = exists().where(DatasetClip.job_id == Job.id)
        with self._database.read() as connection:
            query = select(func.count()).select_from(Job).where(Job.status == JobStatus.QUEUED, of_dataset)
            return connection.scalar(query) or 0

    def unfinished_clips(self) -> int:
        """Number of clips that are to be made, of all datasets that were neither cancelled nor deleted."""
        left = func.sum(Dataset.total - Dataset.done - Dataset.missing)
        active = and_(Dataset.status == DatasetStatus.IN_PROGRESS, Dataset.deleted_at.is_(None))
        with self._database.read() as connection:
            return int(connection.scalar(select(left).where(active)) or 0)

    def submit(self, claim: DatasetRecord, *, limit: int) -> list[str]:
        """Make jobs of the next clips: first those that need another try, then those that have no row yet.

        Clips from the first on whose job would go over a quota of the tenant stay as they are. So that the tenant can
        ask for something else meanwhile, datasets take half of its places in the queue.

        Returns:
            Ids of the jobs.

        Raises:
            ClaimLostError: The claim does not stand any more.
        """
        with self._database.write() as connection:
            dataset = self._hold(connection, claim)
            query = select(_CLIP).where(_CLIP.c.dataset_seq == dataset.seq, _CLIP.c.state == ClipState.PENDING.value)
            again = connection.execute(query.order_by(_CLIP.c.number).limit(limit)).all()
            new = _plan(dataset)[dataset.planned : dataset.planned + limit - len(again)]
            rows = [
                {
                    "number": dataset.planned + place,
                    "label": label,
                    "index_in_label": index,
                    "split": split,
                    "tries": 1,
                    "seed": clip_seed(dataset.seed, dataset.labels[label]["name"], index, 1),
                }
                for place, (label, index, split) in enumerate(new)
            ]
            jobs = [_job(dataset, row.label, row.seed) for row in again]
            jobs += [_job(dataset, row["label"], row["seed"]) for row in rows]
            fit = fitting(connection, dataset.tenant, jobs, self._limits, queue_share=QUEUE_SHARE)
            job_ids = insert_jobs(connection, jobs[: fit.num_jobs])
            changes = [
                {"at": row.number, "job": job_id} for row, job_id in zip(again, job_ids[: len(again)], strict=False)
            ]
            if changes:
                statement = update(_CLIP).where(
                    _CLIP.c.dataset_seq == dataset.seq,
                    _CLIP.c.number == bindparam("at"),
                    _CLIP.c.state == ClipState.PENDING.value,
                )
                connection.execute(statement.values(state=ClipState.SUBMITTED.value, job_id=bindparam("job")), changes)
            made = [
                {**row, "dataset_seq": dataset.seq, "state": ClipState.SUBMITTED.value, "job_id": job_id}
                for row, job_id in zip(rows, job_ids[len(again) :], strict=False)
            ]
            if made:
                connection.execute(insert(_CLIP), made)
                self._change(connection, dataset, {"planned": dataset.planned + len(made)})
        return job_ids

    def settle(self, claim: DatasetRecord, *, limit: int) -> int:
        """Record which clips have come to an end; returns how many that were.

        A try that came to nothing is noted, and the clip gets another with a further seed until it has had as many as
        the dataset allows.

        Raises:
            ClaimLostError: The claim does not stand any more.
        """
        columns = [
            DatasetClip.number,
            DatasetClip.label,
            DatasetClip.index_in_label,
            DatasetClip.tries,
            DatasetClip.seed,
            DatasetClip.job_id,
        ]
        query = (
            select(
                *columns,
                case((Job.deleted_at.is_(None), Job.status)).label("status"),
                Job.attempt,
                Job.error_code,
                Job.error_message,
                DatasetPayload.seq.label("payload"),
            )
            .select_from(DatasetClip)
            .join(Job, Job.id == DatasetClip.job_id, isouter=True)
            .join(
                DatasetPayload,
                and_(DatasetPayload.job_id == Job.id, DatasetPayload.attempt == Job.attempt),
                isouter=True,
            )
            .where(DatasetClip.dataset_seq == claim.seq, DatasetClip.state == ClipState.SUBMITTED, AT_END)
            .order_by(DatasetClip.number)
            .limit(limit)
        )
        with self._database.read() as connection:
            ended = connection.execute(query).all()
        if not ended:
            return 0
        with self._database.write() as connection:
            dataset = self._hold(connection, claim)
            done, missing, drops = dataset.done, dataset.missing, []
            for row in ended:
                values: dict[str, Any]
                if row.status == JobStatus.SUCCEEDED and row.payload is not None:
                    done += 1
                    values = {"state": ClipState.DONE.value, "attempt": row.attempt, "done_number": done}
                elif row.status is None or row.status == JobStatus.CANCELED:
                    missing += 1
                    values = {"state": ClipState.MISSING.value, "reason": "Its video was cancelled or deleted."}
                else:
                    code, message = row.error_code, row.error_message
                    if row.status == JobStatus.SUCCEEDED:
                        code, message = "file_missing", "The worker made no file for the archive."
                    drop = {"number": row.number, "try_number": row.tries, "seed": row.seed, "job_id": row.job_id}
                    drops.append({**drop, "dataset_seq": dataset.seq, "code": code, "message": message or code})
                    if row.tries >= dataset.filters["max_tries"] or dataset.status is DatasetStatus.CANCELLING:
                        missing += 1
                        values = {"state": ClipState.MISSING.value, "reason": message}
                    else:
                        label = dataset.labels[row.label]["name"]
                        values = {
                            "state": ClipState.PENDING.value,
                            "tries": row.tries + 1,
                            "seed": clip_seed(dataset.seed, label, row.index_in_label, row.tries + 1),
                            "job_id": None,
                        }
                connection.execute(
                    update(DatasetClip)
                    .where(DatasetClip.dataset_seq == dataset.seq, DatasetClip.number == row.number)
                    .values(values)
                )
            if drops:
                connection.execute(insert(_DROP), drops)
            counts = {"done": done, "missing": missing, "dropped": dataset.dropped + len(drops)}
            self._change(connection, dataset, counts)
        return len(ended)

    def submitted_jobs(self, claim: DatasetRecord, *, limit: int) -> list[str]:
        """Ids of jobs whose end has not been seen, and that nobody has asked to stop."""
        query = (
            select(DatasetClip.job_id)
            .join(Job, Job.id == DatasetClip.job_id)
            .where(
                DatasetClip.dataset_seq == claim.seq,
                DatasetClip.state == ClipState.SUBMITTED,
                Job.cancel_requested.is_(False),
                Job.status.not_in(FINISHED),
            )
        )
        with self._database.read() as connection:
            return [job_id for job_id in connection.scalars(query.limit(limit)) if job_id is not None]

    def finish(self, claim: DatasetRecord) -> bool:
        """End a dataset if nothing of it is outstanding; whether it was ended.

        Raises:
            ClaimLostError: The claim does not stand any more.
        """
        with self._database.write() as connection:
            dataset = self._hold(connection, claim)
            submitted = and_(DatasetClip.dataset_seq == dataset.seq, DatasetClip.state == ClipState.SUBMITTED)
            if connection.scalar(select(func.count()).select_from(DatasetClip).where(submitted)):
                return False
            if dataset.status is DatasetStatus.CANCELLING:
                status = DatasetStatus.CANCELLED
                missing = dataset.total - dataset.done
                pending = and_(DatasetClip.dataset_seq == dataset.seq, DatasetClip.state == ClipState.PENDING)
                values = {"state": ClipState.MISSING.value, "reason": "The dataset was cancelled."}
                connection.execute(update(DatasetClip).where(pending).values(values))
            elif dataset.done + dataset.missing == dataset.total:
                status, missing = DatasetStatus.COMPLETED, dataset.missing
            else:
                return False
            changes = {"status": status.value, "missing": missing, "ended_at": database_now(), "lease_until": None}
            self._change(connection, dataset, changes)
        return True

    def all_jobs(self, claim: DatasetRecord, *, limit: int) -> list[str]:
        """Ids of jobs that were made for the dataset and are still there."""
        mine = or_(
            Job.id.in_(select(DatasetClip.job_id).where(DatasetClip.dataset_seq == claim.seq)),
            Job.id.in_(select(DatasetDrop.job_id).where(DatasetDrop.dataset_seq == claim.seq)),
        )
        with self._database.read() as connection:
            query = select(Job.id).where(mine, Job.deleted_at.is_(None)).limit(limit)
            return list(connection.scalars(query))

    def forget(self, claim: DatasetRecord) -> None:
        """Remove the rows of a deleted dataset."""
        with self._database.write() as connection:
            for table in (DatasetDrop, DatasetPayload, DatasetClip):
                connection.execute(delete(table).where(table.dataset_seq == claim.seq))
            connection.execute(delete(Dataset).where(Dataset.seq == claim.seq, Dataset.token == claim.token))

    def known_attempts(self, dataset_id: str, job_ids: Sequence[str]) -> dict[str, int | None]:
        """Of those jobs of the dataset that count, the attempt that does; None: it is not known yet."""
        query = (
            select(DatasetClip.job_id, DatasetClip.attempt)
            .join(Dataset, Dataset.seq == DatasetClip.dataset_seq)
            .where(Dataset.id == dataset_id, DatasetClip.job_id.in_(job_ids))
        )
        with self._database.read() as connection:
            return {row.job_id: row.attempt for row in connection.execute(query)}

    def _hold(self, connection: Connection, claim: DatasetRecord) -> DatasetRecord:
        """Prolong the claim within a transaction; nobody can take it over until that ends."""
        mine = and_(
            Dataset.seq == claim.seq,
            Dataset.token == claim.token,
            Dataset.status == claim.status,
            Dataset.deleted_at.is_(None),
        )
        statement = update(_DATASET).where(mine).values(lease_until=database_now() + self._lease_s)
        row = connection.execute(statement.returning(*_DATASET.c)).one_or_none()
        if row is None:
            raise ClaimLostError(claim.id)
        return _record(row)

    def _change(self, connection: Connection, dataset: DatasetRecord, values: dict[str, Any]) -> None:
        statement = update(_DATASET).where(Dataset.seq == dataset.seq).values(values).returning(*_DATASET.c)
        changed = _record(connection.execute(statement).one())
        if changed.status is not dataset.status:
            _announce(connection, changed)
        elif (changed.done, changed.missing) != (dataset.done, dataset.missing):
            _announce(connection, changed, kind="dataset.progress")

    # -- workers ---------------------------------------------------------------------------------------------

    def orders_of(self, job_ids: Collection[str]) -> dict[str, ClipOrder]:
        """What is to be done beyond the video, for those of these jobs that are of a dataset."""
        query = (
            select(
                DatasetClip.job_id,
                Dataset.seq,
                Dataset.id,
                DatasetClip.number,
                Dataset.format,
                Dataset.filters,
                Dataset.about,
            )
            .join(DatasetClip, DatasetClip.dataset_seq == Dataset.seq)
            .where(DatasetClip.job_id.in_(job_ids))
        )
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return {
            row.job_id: ClipOrder(
                dataset_seq=row.seq,
                dataset_id=row.id,
                number=row.number,
                format=row.format,
                filters=row.filters,
                modality=row.about["modality"],
            )
            for row in rows
        }

    def fingerprints(self, dataset_seq: int, *, after: int, limit: int) -> list[FingerprintRow]:
        """Fingerprints of clips that came behind the place ``after``, oldest first."""
        with self._database.read() as connection:
            return _fingerprints(connection, dataset_seq, after=after, limit=limit)

    def add_payload(
        self,
        order: ClipOrder,
        values: dict[str, Any],
        *,
        compare: Callable[[list[FingerprintRow]], None] | None,
        after: int = 0,
    ) -> None:
        """Note the file of a clip, unless ``compare`` raises.

        It is shown the fingerprints that came behind the place ``after``, while none can be added: of two equal clips
        that come at once, one always sees the other.
        """
        with self._database.write() as connection:
            if compare is not None:
                query = select(_DATASET.c.seq).where(_DATASET.c.seq == order.dataset_seq).with_for_update()
                connection.execute(query)
                compare(_fingerprints(connection, order.dataset_seq, after=after, limit=None))
            # of earlier tries and attempts nothing will come any more; a later one keeps its own
            earlier = or_(_PAYLOAD.c.job_id != values["job_id"], _PAYLOAD.c.attempt < values["attempt"])
            mine = and_(_PAYLOAD.c.dataset_seq == order.dataset_seq, _PAYLOAD.c.number == order.number, earlier)
            if connection.scalar(select(DatasetClip.number).where(DatasetClip.job_id == values["job_id"])) is None:
                return  # the dataset has gone
            connection.execute(delete(_PAYLOAD).where(mine))
            connection.execute(insert(_PAYLOAD).values(dataset_seq=order.dataset_seq, number=order.number, **values))


def _fingerprints(connection: Connection, dataset_seq: int, *, after: int, limit: int | None) -> list[FingerprintRow]:
    query = select(_PAYLOAD.c.seq, _PAYLOAD.c.number, type_coerce(_PAYLOAD.c.fingerprint, LargeBinary))
    query = query.where(_PAYLOAD.c.dataset_seq == dataset_seq, _PAYLOAD.c.seq > after)
    return [FingerprintRow(*row) for row in connection.execute(query.order_by(_PAYLOAD.c.seq).limit(limit))]


def _plan(dataset: DatasetRecord) -> list[tuple[int, int, int]]:
    counts = [label["count"] for label in dataset.labels]
    return planned_clips(counts, [split["ratio"] for split in dataset.splits])


def _job(dataset: DatasetRecord, label: int, seed: int) -> dict[str, Any]:
    """The columns of a clip's job."""
    name = dataset.labels[label]["name"]
    job = {**dataset.settings, "tenant": dataset.tenant, "model": dataset.model}
    return job | {"prompt": name, "label": name, "seed": seed, "priority": PRIORITY}


def _own(tenant: str, dataset_id: str) -> tuple[Any, ...]:
    return (Dataset.id == dataset_id, Dataset.tenant == tenant, Dataset.deleted_at.is_(None))


def _clips(dataset: DatasetRecord) -> Any:
    names = (
        "number", "label", "split", "state", "tries", "seed", "job_id", "attempt", "done_number", "reason",
    )  # fmt: skip
    files = ("size_bytes", "parts", "frames_sha256", "measures")
    same = and_(_PAYLOAD.c.job_id == _CLIP.c.job_id, _PAYLOAD.c.attempt == _CLIP.c.attempt)
    query = select(*(_CLIP.c[name] for name in names), *(_PAYLOAD.c[name] for name in files))
    return query.join(_PAYLOAD, same, isouter=True).where(_CLIP.c.dataset_seq == dataset.seq)


def _clip_record(row: Any) -> ClipRecord:
    values = dict(row._mapping)
    return ClipRecord(**{**values, "state": ClipState(values["state"])})


def _announce(connection: Connection, dataset: DatasetRecord, *, kind: str | None = None) -> None:
    """Tell what has become of a dataset to those who follow events."""
    counts = {"total": dataset.total, "done": dataset.done, "missing": dataset.missing}
    data: dict[str, Any] = {"id": dataset.id, "status": dataset.status.value, "clip_counts": counts}
    told = f"dataset.{dataset.status.value}" if kind is None else kind
    emit(connection, tenant=dataset.tenant, kind=told, subject=dataset.id, data=data, passing=kind is not None)


def _record(row: Any) -> DatasetRecord:
    values = dict(row._mapping)
    return DatasetRecord(**{**values, "status": DatasetStatus(values["status"])})
