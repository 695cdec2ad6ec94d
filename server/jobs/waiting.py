"""How long an unfinished job may still take: asked at every poll, so in one query, and put together once."""

from typing import Any

from sqlalchemy import Connection, and_, bindparam, case, func, or_, select, true

from server.jobs.model import Job, JobStatus

__all__ = ["expected_wait_s"]

_PACE_OF = 10


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
    return select(pace), select(pace, ahead).select_from(pace.join(ahead, true()))


_PACE, _PACE_AND_AHEAD = _queries()


def expected_wait_s(
    connection: Connection, *, model: str, priority: int, seq: int, steps_left: int, is_queued: bool
) -> float | None:
    """Rough seconds until an unfinished job is done, by the pace of the last jobs; None: no such job yet.

    Args:
        steps_left: Of its sampling.
        is_queued: Whether others have to be done before.
    """
    if not is_queued:
        pace = connection.execute(_PACE, {"model": model}).one()
        return None if pace.step_s is None else float(pace.step_s) * steps_left
    row = connection.execute(_PACE_AND_AHEAD, {"model": model, "priority": priority, "seq": seq}).one()
    if row.step_s is None:
        return None
    # As many workers as are at it now will go on, each as many clips at a time as lately.
    return float(row.step_s) * steps_left + float(row.clip_step_s) * float(row.steps) / max(1, int(row.workers))
