"""Sums over all jobs that ever were, for /metrics: rows that are there plus sums of rows that are gone."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, case, func, insert, select, update

from server.jobs.database import Database
from server.jobs.model import DeletedTotal, Job, JobStatus

__all__ = ["Totals", "add_to_deleted", "read_totals"]

_SUCCEEDED = Job.status == JobStatus.SUCCEEDED


def _over_jobs() -> dict[str, ColumnElement[Any]]:
    """The sums, as SQL over the job table. Frames and stage times count successful jobs only."""
    return {
        "jobs": func.count(),
        "frames": func.coalesce(func.sum(case((_SUCCEEDED, Job.num_frames), else_=0)), 0),
        "video_s": func.coalesce(func.sum(case((_SUCCEEDED, Job.num_frames / Job.fps), else_=0.0)), 0.0),
        "redelivered": func.coalesce(func.sum(case((Job.attempt > 1, Job.attempt - 1), else_=0)), 0),
        "latency_s": func.coalesce(func.sum(Job.completed_at - Job.created_at), 0.0),
        "queue_s": func.coalesce(func.sum(Job.started_at - Job.queued_at), 0.0),
        "sampling_s": func.coalesce(func.sum(Job.sampling_s), 0.0),
        "encode_s": func.coalesce(func.sum(Job.encode_s), 0.0),
        "store_s": func.coalesce(func.sum(Job.store_s), 0.0),
    }


@dataclass(kw_only=True)
class Totals:
    """Sums over jobs of one model in one state; times in seconds."""

    jobs: int = 0
    frames: int = 0
    video_s: float = 0.0
    redelivered: int = 0
    latency_s: float = 0.0
    queue_s: float = 0.0
    sampling_s: float = 0.0
    encode_s: float = 0.0
    store_s: float = 0.0


def add_to_deleted(connection: Connection, condition: ColumnElement[bool]) -> None:
    """Add the jobs that match to the sums of deleted ones; the caller removes them in the same transaction."""
    query = select(Job.model, Job.status, *(sql.label(name) for name, sql in _over_jobs().items()))
    for row in connection.execute(query.where(condition).group_by(Job.model, Job.status)).all():
        sums = {name: row._mapping[name] for name in _over_jobs()}
        raised = {name: getattr(DeletedTotal, name) + value for name, value in sums.items()}
        key = (DeletedTotal.model == row.model, DeletedTotal.status == row.status)
        if connection.execute(update(DeletedTotal).where(*key).values(raised)).rowcount == 0:
            connection.execute(insert(DeletedTotal).values(model=row.model, status=row.status, **sums))


def read_totals(database: Database) -> dict[tuple[str, JobStatus], Totals]:
    """Sums by model and state over all jobs, deleted ones included; one consistent view."""
    query = select(Job.model, Job.status, *(sql.label(name) for name, sql in _over_jobs().items()))
    totals: dict[tuple[str, JobStatus], Totals] = {}
    with database.read() as connection:
        rows = [
            *connection.execute(query.group_by(Job.model, Job.status)),
            *connection.execute(select(DeletedTotal.__table__)),
        ]
    for row in rows:
        total = totals.setdefault((row.model, JobStatus(row.status)), Totals())
        for name in _over_jobs():
            setattr(total, name, getattr(total, name) + row._mapping[name])
    return totals
