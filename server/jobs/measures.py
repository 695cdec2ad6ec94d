"""What is measured of jobs: when they are tried again, when they end, and of the batches that they are sampled in."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from server.jobs.model import TERMINAL, JobStatus
from server.measures import Measure, Observation, add_observations

__all__ = ["BATCH_SIZE", "JOB_MEASURES", "measure_claimed", "measure_ended", "zeros"]

# A tiny model on an idle GPU takes milliseconds; long clips on a CPU, or at the end of a long queue, half an hour.
_LATENCY_EDGES = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_STAGE_EDGES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 1800.0)
_STEP_EDGES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_RATIO_EDGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_BATCH_EDGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)

LATENCY = Measure(
    name="medsora_request_latency_seconds",
    about="Seconds from acceptance to the end of a job.",
    labels=("model", "status"),
    edges=_LATENCY_EDGES,
)
QUEUE_TIME = Measure(
    name="medsora_queue_time_seconds",
    about="Seconds that completed jobs waited for a worker, before the attempt that made them.",
    labels=("model",),
    edges=_LATENCY_EDGES,
)
STAGES = Measure(
    name="medsora_stage_latency_seconds",
    about="Seconds of the parts of completed jobs; sample is the sampler and the decoder, of the whole batch.",
    labels=("model", "stage"),
    edges=_STAGE_EDGES,
)
STEP = Measure(
    name="medsora_denoise_step_seconds",
    about="Seconds of the stage sample, divided by the steps of the sampler, of completed jobs.",
    labels=("model",),
    edges=_STEP_EDGES,
)
REAL_TIME_FACTOR = Measure(
    name="medsora_real_time_factor",
    about="Seconds that the making of a video took, divided by those that it lasts.",
    labels=("model",),
    edges=_RATIO_EDGES,
)
BATCH_SIZE = Measure(
    name="medsora_batch_size",
    about="Clips that were sampled together, by batch.",
    labels=("model",),
    edges=_BATCH_EDGES,
)
FAILURES = Measure(
    name="medsora_requests_failed",
    about="Jobs that failed, by the code of their error.",
    labels=("model", "code"),
)

REQUESTS = Measure(name="medsora_requests", about="Finished jobs.", labels=("model", "status"))
FRAMES = Measure(name="medsora_frames_generated", about="Frames of completed videos.", labels=("model",))
VIDEO_SECONDS = Measure(name="medsora_video_seconds_generated", about="Length of completed videos.", labels=("model",))
REDELIVERED = Measure(name="medsora_jobs_redelivered", about="Second and further attempts.", labels=("model",))

JOB_MEASURES = (
    LATENCY, QUEUE_TIME, STAGES, STEP, REAL_TIME_FACTOR, BATCH_SIZE, FAILURES, REQUESTS, FRAMES, VIDEO_SECONDS,
    REDELIVERED,
)  # fmt: skip


def zeros(model: str) -> list[tuple[Measure, tuple[str, ...]]]:
    """Counters of a model, with their labels, that are told before there is anything to count."""
    ends = [(REQUESTS, (model, status.value)) for status in sorted(TERMINAL)]
    return [*ends, *((measure, (model,)) for measure in (FRAMES, VIDEO_SECONDS, REDELIVERED))]


def measure_claimed(connection: Connection, rows: Sequence[Any]) -> None:
    """Count those of these jobs, just claimed, that were claimed before, in the transaction that claims them."""
    again = [Observation(REDELIVERED, (row.model,)) for row in rows if row.attempt > 1]
    add_observations(connection, again)


def measure_ended(connection: Connection, rows: Sequence[Any]) -> None:
    """Count those of these jobs that have just ended, in the transaction that ended them.

    Args:
        rows: Whole rows of the job table, as they are now. A job ends once, so it must be given once.
    """
    add_observations(connection, [one for row in rows if row.status in TERMINAL for one in _observations(row)])


def _observations(row: Any) -> list[Observation]:
    model = row.model
    found = [
        Observation(LATENCY, (model, row.status), max(0.0, row.completed_at - row.created_at)),
        Observation(REQUESTS, (model, row.status)),
    ]
    if row.status == JobStatus.FAILED:
        found.append(Observation(FAILURES, (model, row.error_code)))
    if row.status == JobStatus.SUCCEEDED:
        work_s = row.sampling_s + row.encode_s + row.store_s
        found += [
            Observation(FRAMES, (model,), row.num_frames),
            Observation(VIDEO_SECONDS, (model,), row.num_frames / row.fps),
            Observation(QUEUE_TIME, (model,), max(0.0, row.started_at - row.queued_at)),
            Observation(STAGES, (model, "sample"), row.sampling_s),
            Observation(STAGES, (model, "encode"), row.encode_s),
            Observation(STAGES, (model, "store"), row.store_s),
            Observation(STEP, (model,), row.sampling_s / row.num_inference_steps),
            Observation(REAL_TIME_FACTOR, (model,), work_s * row.fps / row.num_frames),
        ]
    return found
