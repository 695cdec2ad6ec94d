"""What is told of jobs. States come from the rows that a transaction has changed; see ``server/jobs/repository.py``."""

import base64
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete

from server.events.log import NewEvent, emit, emit_all
from server.events.model import Event
from server.jobs.model import TERMINAL, JobStatus

__all__ = [
    "LAST_KINDS",
    "PREVIEW",
    "PROGRESS",
    "QUEUED",
    "announce_deletion",
    "announce_preview",
    "announce_progress",
    "announce_states",
    "state_of",
]

QUEUED, PROGRESS, PREVIEW, DELETED = "video.queued", "video.progress", "video.preview", "video.deleted"
_KINDS = {
    JobStatus.QUEUED: QUEUED,
    JobStatus.RUNNING: "video.started",
    JobStatus.SUCCEEDED: "video.completed",
    JobStatus.FAILED: "video.failed",
    JobStatus.CANCELED: "video.cancelled",
}
LAST_KINDS = frozenset({"video.completed", "video.failed", "video.cancelled", DELETED})
"""After one of these nothing happens to a job that its followers wait for."""
_STATUS = {
    JobStatus.QUEUED: "queued",
    JobStatus.RUNNING: "in_progress",
    JobStatus.SUCCEEDED: "completed",
    JobStatus.FAILED: "failed",
    JobStatus.CANCELED: "failed",  # as in answers of the API, with the code cancelled
}


_FORGET_PASSING = delete(Event).where(Event.subject.in_(bindparam("ended", expanding=True)), Event.passing.is_(True))


def state_of(job: Any) -> tuple[str, dict[str, Any]]:
    """Kind and data of the event that tells the state of a job: a row, or a record of one."""
    status = JobStatus(job.status)
    steps = job.num_inference_steps
    progress = 100 if status is JobStatus.SUCCEEDED else min(99, 100 * job.steps_done // steps)
    data: dict[str, Any] = {"id": job.id, "status": _STATUS[status], "model": job.model, "progress": progress}
    if status is JobStatus.RUNNING:
        data["attempt"] = job.attempt
    if job.error_code is not None:
        data["error"] = {"code": job.error_code, "message": job.error_message or job.error_code}
    return _KINDS[status], data


def announce_states(connection: Connection, rows: Sequence[Any]) -> None:
    """Tell the new state of each job of these rows, which the transaction has just made or changed."""
    ended = [row.id for row in rows if JobStatus(row.status) in TERMINAL]
    if ended:  # how they came there is of no interest any more
        connection.execute(_FORGET_PASSING, {"ended": ended})
    told = [(row, *state_of(row)) for row in rows]
    emit_all(
        connection,
        [
            NewEvent(
                tenant=row.tenant,
                kind=kind,
                subject=row.id,
                data=data,
                webhook_url=row.webhook_url,
                webhook_secret=row.webhook_secret,
            )
            for row, kind, data in told
        ],
    )


def announce_progress(connection: Connection, rows: Sequence[Any]) -> None:
    """Tell how far the running jobs of these rows are."""
    events = []
    for row in rows:
        _, data = state_of(row)
        data |= {"steps_done": row.steps_done, "num_inference_steps": row.num_inference_steps}
        events.append(NewEvent(tenant=row.tenant, kind=PROGRESS, subject=row.id, data=data, passing=True))
    emit_all(connection, events)


def announce_preview(connection: Connection, row: Any, image: bytes, *, steps_done: int) -> None:
    """Show what a running job will look like, as a WebP picture, taken after a number of steps."""
    data = {
        "id": row.id,
        "steps_done": steps_done,
        "num_inference_steps": row.num_inference_steps,
        "image": f"data:image/webp;base64,{base64.b64encode(image).decode()}",
    }
    emit(connection, tenant=row.tenant, kind=PREVIEW, subject=row.id, data=data, passing=True)


def announce_deletion(connection: Connection, row: Any) -> None:
    """Tell that a client has deleted a job."""
    emit(connection, tenant=row.tenant, kind=DELETED, subject=row.id, data={"id": row.id})
