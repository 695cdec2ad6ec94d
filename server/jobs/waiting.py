"""How long an unfinished job may still take: asked at every poll, so one query, put together once."""

from typing import Any

from sqlalchemy import Connection, and_, bindparam, case, func, or_, select, true

from server.jobs.model import Job, JobStatus

__all__ = ["expected_wait_s"]

_PACE_OF = 10


def _query() -> Any:
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
    return select(pace, ahead).select_from(pace.join(ahead, true()))


_QUERY = _query()


def expected_wait_s(connection: Connection, job: Any) -> float | None:
    """Rough seconds until an unfinished job is done, by the pace of the last jobs; None: no such job yet.

    Args:
        job: Its row, or a record of it.
    """
    parameters = {"model": job.model, "priority": job.priority, "seq": job.seq}
    row = connection.execute(_QUERY, parameters).one()
    if row.step_s is None:
        return None
    own_s = float(row.step_s) * float(job.num_inference_steps - job.steps_done)
    if job.status != JobStatus.QUEUED:
        return own_s
    # As many workers as are at it now will go on, each as many clips at a time as lately.
    return own_s + float(row.clip_step_s) * float(row.steps) / max(1, int(row.workers))
