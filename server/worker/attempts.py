"""What a trace tells of an attempt at a job: waiting, claim, sampling, encoding, storing, the last write."""

import time

from server.jobs.repository import Claim, FinishedWork
from server.tracing import record

__all__ = ["trace_attempt"]


def trace_attempt(claim: Claim, outcome: str, *, work: FinishedWork | None = None, made_s: float | None = None) -> None:
    """Make the spans of an attempt that is over.

    Args:
        outcome: succeeded, canceled, lost, handed_back, or the code of an error.
        work: What was made, if anything was.
        made_s: When its files were there, and it had only to be written to the job table; Unix seconds.
    """
    job, now = claim.job, time.time()
    is_error = outcome not in ("succeeded", "canceled", "handed_back")
    about = {
        "medsora.job_id": job.id,
        "medsora.tenant": job.tenant,
        "medsora.request_id": job.request_id,
        "medsora.model": job.model,
        "medsora.attempt": claim.token,
        "medsora.outcome": outcome,
        "medsora.num_inference_steps": job.num_inference_steps,
        "medsora.num_frames": job.num_frames,
        "medsora.size": f"{job.width}x{job.height}",
        "medsora.worker": job.worker,
        "medsora.batch_size": None if work is None else work.batch_size,
    }
    began_s = claim.taken_at if job.started_at is None else job.started_at  # by the database's clock
    record("queue", parent=job.traceparent, began_s=job.queued_at, ended_s=began_s)
    error = outcome if is_error else None
    span = record("attempt", parent=job.traceparent, began_s=began_s, ended_s=now, error=error, attributes=about)
    record("claim", parent=span, began_s=began_s, ended_s=claim.taken_at)
    if work is None or made_s is None:
        return
    ended_s = made_s
    # Encoding and storing alternate, file by file: their spans show the sums, one after the other.
    for name, seconds in (("store", work.store_s), ("encode", work.encode_s), ("sample", work.sampling_s)):
        record(name, parent=span, began_s=ended_s - seconds, ended_s=ended_s)
        ended_s -= seconds
    record("settle", parent=span, began_s=made_s, ended_s=now)
