"""How long an unfinished job may still take: asked at every poll, so in one query, and put together once."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, bindparam, case, func, or_, select, true

from server.jobs.database import database_now
from server.jobs.model import Job, JobStatus

__all__ = ["Outlook", "outlook"]

_PACE_OF = 10


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a client who waits for a job may be told."""

    left_s: float | None
    """Rough seconds until its clip is sampled, by the pace of the last jobs; None: no such job yet."""
    age_s: float
    """Seconds since it was asked for."""


def _queries() -> tuple[Any, Any]:
    """The pace of a model's last jobs; and the same with the work that is before a waiting job."""
    recent = (
        select(
            (Job.sampling_s / Job.num_inference_steps).label("step_s"),
            (Job.sampling_s / Job.num_inference_steps / func.coalesce(Job.batch_size, 1)).label("clip_step_s"),
        )
        .where(Job.status == JobStatus.SUCCEEDED, Job.model == bindparam("model"))
        .order_by(Job.seq.desc())
        .limit(_PACE_OF)
        .subquery()
    )
    pace = select(
        func.avg(recent.c.step_s).label("step_s"), func.avg(recent.c.clip_step_s).label("clip_step_s")
    ).subquery()
    priority: Any = bindparam("priority")
    seq: Any = bindparam("seq")
    sooner = or_(Job.priority > priority, and_(Job.priority == priority, Job.seq < seq))
    before = or_(Job.status == JobStatus.RUNNING, and_(Job.status == JobStatus.QUEUED, sooner))
    ahead = (
        select(
            func.coalesce(func.sum(Job.num_inference_steps - Job.steps_done), 0).label("steps"),
            func.count(case((Job.status == JobStatus.RUNNING, Job.worker)).distinct()).label("workers"),
        )
        .where(before)
        .subquery()
    )
    now = database_now().label("now")
    return select(pace, now), select(pace, ahead, now).select_from(pace.join(ahead, true()))


_PACE, _PACE_AND_AHEAD = _queries()


def outlook(connection: Connection, job: Any) -> Outlook:
    """How it stands with an unfinished job.

    Args:
        job: Its record; one that waits has others before it.
    """
    if job.status is JobStatus.QUEUED:
        row = connection.execute(_PACE_AND_AHEAD, {"model": job.model, "priority": job.priority, "seq": job.seq}).one()
        # As many workers as are at it now will go on, each as many clips at a time as lately.
        steps_before = float(row.steps) / max(1, int(row.workers))
    else:
        row = connection.execute(_PACE, {"model": job.model}).one()
        steps_before = 0.0
    left_s = None
    if row.step_s is not None:
        left_s = float(row.step_s) * (job.num_inference_steps - job.steps_done) + float(row.clip_step_s) * steps_before
    return Outlook(left_s=left_s, age_s=max(0.0, float(row.now) - job.created_at))
