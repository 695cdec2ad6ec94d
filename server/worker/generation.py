"""From claims to samples: batches of jobs that are alike, and what becomes of them when something goes wrong.

Whatever happens, a job is settled here or in ``finishing.py``, unless the process dies or the database cannot be
reached: then the lease runs out and the reaper settles it. A job that a worker was lost with is claimed alone the next
time (``server/jobs/sharing.py``), so that one that kills its process does so three times, and its neighbours once. They
are those of its batch, of the batches before and of the one after it, which the process has in hand, too.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from functools import partial

from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy.exc import SQLAlchemyError

from medsora.errors import BackendError, CheckpointError
from medsora.request import GenerationRequest
from server.jobs.model import JobStatus
from server.jobs.queue import JobQueue, QueueError
from server.jobs.repository import EXHAUSTED, Claim, JobRecord, log_fields
from server.logs import bound
from server.objects import StorageFullError, StorageUnavailableError
from server.worker.attempts import trace_attempt
from server.worker.finishing import Finisher, SampledBatch, close_canceled, explain, leave_to_reaper, names_of, settle
from server.worker.next_batch import NextBatch
from server.worker.pieces import is_made_at_once, make_in_pieces
from server.worker.preview import PreviewWriter
from server.worker.progress import ClaimKeeper, ClaimLost, JobCanceled, WorkerStopping
from server.worker.runtime import WorkerRuntime

__all__ = ["request_of", "run_jobs"]

logger = logging.getLogger(__name__)


def run_jobs(runtime: WorkerRuntime) -> int:
    """Make videos of waiting jobs until none waits, this worker is to stop, or its turn is over; returns how many.

    While a batch is sampled the two before are encoded and stored, so at most three batches of clips are held; and
    where many wait, the jobs of the next one are claimed in its last second.
    """
    settings = runtime.settings
    until = time.monotonic() + settings.turn_s
    taken = 0
    more = False
    with (
        ClaimKeeper(
            runtime.repository,
            lease_s=settings.lease_s,
            heartbeat_s=settings.heartbeat_s,
            progress_interval_s=settings.progress_interval_s,
            giving_up=runtime.giving_up,
        ) as keeper,
        Finisher(runtime, keeper) as finisher,
        NextBatch(
            claim=lambda: _claim(runtime, keeper),
            claim_ahead=lambda: _claim_ahead(runtime, keeper),
            hand_back=lambda claims: _hand_back(runtime, keeper, claims),
            until=until,
        ) as next_batch,
    ):
        while not runtime.stopping.is_set():
            if time.monotonic() >= until and not next_batch.is_looked_for:
                more = True
                break
            if runtime.storage.is_suspect:
                finisher.wait()
            if not runtime.storage.is_well():
                break  # the reaper tells of waiting jobs again and again
            try:
                claims = next_batch.take()
            except SQLAlchemyError as error:
                logger.warning("no job can be claimed now, and the reaper will tell of those that wait: %s", error)
                break
            if not claims:
                if finisher.wait():  # meanwhile more may have come, or come back
                    continue
                break
            taken += len(claims)
            if _is_suspect(claims[0]):
                finisher.wait()  # nothing else is in this process while one runs that may have ended another
            if not _run_batch(runtime, keeper, finisher, next_batch, claims):
                break
            if _is_suspect(claims[0]):
                finisher.wait()
    if more:
        _publish_hint(runtime)
    return taken


def _claim_ahead(runtime: WorkerRuntime, keeper: ClaimKeeper) -> list[Claim]:
    """As :func:`_claim`, beside a batch that is sampled: none that may end this process, nor any in doubt."""
    if runtime.stopping.is_set() or runtime.storage.is_suspect:
        return []
    claims = _claim(runtime, keeper)
    if claims and _is_suspect(claims[0]):
        _hand_back(runtime, keeper, claims)
        return []
    return claims


def _claim(runtime: WorkerRuntime, keeper: ClaimKeeper) -> list[Claim]:
    """The jobs to be sampled next, together; where several came lately, a short wait for more of their kind."""
    settings = runtime.settings
    claims = runtime.repository.claim_next(worker=runtime.worker_id, most=lambda job: _limit(runtime, job))
    if not claims:
        return []
    keeper.keep(claims)
    first = claims[0].job
    room = _limit(runtime, first) - len(claims)
    is_alone = first.deterministic or first.source_id is not None or _is_suspect(claims[0])
    now = time.monotonic()
    is_busy = len(claims) > 1 or now - runtime.busy_at < 1.0
    if len(claims) > 1:
        runtime.busy_at = now
    if room > 0 and not is_alone and is_busy and settings.batch_wait_ms > 0:
        runtime.stopping.wait(settings.batch_wait_ms / 1000)
        try:
            late = runtime.repository.claim_alike(first, worker=runtime.worker_id, most=room)
        except SQLAlchemyError as error:
            logger.warning("a batch goes without those that came late: %s", error)
        else:
            keeper.keep(late)
            claims += late
    return claims


def _run_batch(
    runtime: WorkerRuntime, keeper: ClaimKeeper, finisher: Finisher, next_batch: NextBatch, claims: Sequence[Claim]
) -> bool:
    """Sample jobs together and hand the clips on. When that fails, halves are tried, down to the one at fault.

    Returns:
        Whether this process can go on.
    """
    parts = deque([list(claims)])
    while parts:
        part = [claim for claim in parts.popleft() if not _is_over(runtime, keeper, claim)]
        if not part:
            continue
        try:
            _make(runtime, keeper, finisher, next_batch, part)
        except (JobCanceled, ClaimLost):
            for claim in part:
                _is_over(runtime, keeper, claim)
        except WorkerStopping:
            _hand_back(runtime, keeper, [*part, *[claim for rest in parts for claim in rest]])
            return False
        except SQLAlchemyError as error:
            leave_to_reaper(part, error)
            keeper.let_go(part)
        except StorageUnavailableError as error:
            logger.error("%s: %s", names_of(part), error)
            runtime.storage.is_suspect = True
            _hand_back(runtime, keeper, [*part, *[claim for rest in parts for claim in rest]])
            return True
        except (CheckpointError, BackendError, StorageFullError) as error:  # of all of them, whoever was first
            _fail(runtime, keeper, part, error)
        except SoftTimeLimitExceeded as error:
            if len(part) == 1:
                _fail(runtime, keeper, part, error)
            else:  # which of them takes so long shows when each runs alone
                _hand_back(runtime, keeper, part, uses_attempt=True)
            _hand_back(runtime, keeper, [claim for rest in parts for claim in rest])
            return False
        except Exception as error:
            rest = [claim for other in parts for claim in other]
            if _has_broken_the_device(error):
                finisher.wait()
                if len(part) == 1:
                    _fail(runtime, keeper, part, error)
                else:
                    logger.exception("a batch of %d broke the device; its jobs run one by one now", len(part))
                    _hand_back(runtime, keeper, part, uses_attempt=True)
                _hand_back(runtime, keeper, rest)
                next_batch.give_back()
                logger.error("the GPU context is broken, this process ends")
                logging.shutdown()
                os._exit(70)
            if _is_out_of_memory(error):
                _free_memory()
                if len(part) > 1:
                    runtime.limits.lower(part[0].job.model, _shape(part[0].job), len(part) // 2)
            if len(part) == 1:
                _fail(runtime, keeper, part, error)
                continue
            logger.warning("a batch of %d failed and is tried in halves: %s", len(part), explain(error)[0])
            middle = (len(part) + 1) // 2
            parts.extendleft([part[middle:], part[:middle]])
    return True


def _make(
    runtime: WorkerRuntime, keeper: ClaimKeeper, finisher: Finisher, next_batch: NextBatch, claims: list[Claim]
) -> None:
    """Sample jobs together and let the clips be finished; one that is made in pieces is encoded as they come."""
    _raise_if_stopping(runtime)
    if runtime.store.free_bytes() < runtime.settings.min_free_bytes:
        raise StorageFullError("too little free disk space to begin")
    checkpoint, pipeline = runtime.pipeline(claims[0].job.model)
    requests = [request_of(claim.job) for claim in claims]
    _raise_if_stopping(runtime)  # loading the model, where that had failed at the start, may have taken minutes

    def on_step(steps_done: int, num_steps: int) -> None:
        # of a clip in several windows, or a batch in several parts, these count all of them; the row counts one
        keeper.on_step(claims, steps_done * requests[0].num_inference_steps // num_steps)

    preview = PreviewWriter(runtime.repository, claims, interval_s=runtime.settings.preview_interval_s)
    if not is_made_at_once(claims[0].job, checkpoint.manifest):
        finisher.wait()
        (claim,), (request,) = claims, requests
        work = make_in_pieces(
            runtime,
            claim,
            checkpoint,
            pipeline,
            request,
            on_step=on_step,
            check=lambda: keeper.check(claim),
            preview=preview,
        )
        finisher.publish(claim, work)
        return
    first = claims[0].job
    kind = (first.model, _shape(first), first.sampler, first.num_inference_steps, len(claims))
    if len(claims) == _limit(runtime, first) > 1:  # more wait, most likely; what runs alone is never so many
        next_batch.look_before(runtime.batch_s.get(kind))
    began = time.monotonic()
    frames = pipeline(requests, on_step=on_step, preview=preview)
    sampling_s = runtime.batch_s[kind] = time.monotonic() - began
    finisher.submit(
        SampledBatch(
            checkpoint=checkpoint,
            claims=claims,
            requests=requests,
            frames=frames,
            sampling_s=sampling_s,
        )
    )


def _raise_if_stopping(runtime: WorkerRuntime) -> None:
    """What is not begun is for others, at once."""
    if runtime.stopping.is_set():
        raise WorkerStopping("the worker is stopping")


def _is_suspect(claim: Claim) -> bool:
    """Whether a worker was lost while it had this job; such a job is claimed alone."""
    return claim.token - 1 > claim.job.handed_back


def request_of(job: JobRecord) -> GenerationRequest:
    """What the sampler is asked for."""
    return GenerationRequest(
        label=job.label,
        seed=job.seed,
        num_frames=job.num_frames,
        height=job.height,
        width=job.width,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        sampler=job.sampler,
        # of an extension only the sampler goes on from frames, and what it is given is not the clip's beginning
        prefix_frames=job.prefix_frames,
        strength=job.strength,
    )


def _limit(runtime: WorkerRuntime, job: JobRecord) -> int:
    """How many clips may be sampled together with this one, itself included."""
    if job.num_frames > runtime.window(job.model):  # made in pieces
        return 1
    return runtime.limits.of(job.model, _shape(job))


def _shape(job: JobRecord) -> tuple[object, ...]:
    """What the memory that a batch of a model needs depends on."""
    return (job.num_frames, job.height, job.width, job.guidance_scale != 1)


def _is_over(runtime: WorkerRuntime, keeper: ClaimKeeper, claim: Claim) -> bool:
    """Whether a job is not to go on; then it is settled."""
    end = keeper.end_of(claim)
    if end is None:
        return False
    close_canceled(runtime, keeper, claim, end)
    return True


def _fail(runtime: WorkerRuntime, keeper: ClaimKeeper, claims: Sequence[Claim], error: Exception) -> None:
    code, message = explain(error)
    for claim in claims:
        with bound(**log_fields(claim.job)):
            logger.error("%s failed: %s", claim.job.id, code, exc_info=error)
        try:
            settle(partial(runtime.repository.fail, claim.job.id, claim.token, code=code, message=message))
        except SQLAlchemyError as problem:
            leave_to_reaper([claim], problem)
        trace_attempt(claim, code)
    keeper.let_go(claims)


def _hand_back(
    runtime: WorkerRuntime, keeper: ClaimKeeper, claims: Sequence[Claim], *, uses_attempt: bool = False
) -> None:
    """Let other workers, or this one later, have jobs at once; one that has used its last attempt fails."""
    if not claims:
        return
    keys = [(claim.job.id, claim.token) for claim in claims]
    try:
        done = settle(lambda: runtime.repository.hand_back_all(keys, uses_attempt=uses_attempt))
        for claim in claims:
            if claim.job.id not in done:
                settle(partial(runtime.repository.finish_cancel, claim.job.id, claim.token))
    except SQLAlchemyError as error:
        leave_to_reaper(claims, error)
        return
    finally:
        keeper.let_go(claims)
    outcomes = {None: "canceled", JobStatus.QUEUED: "handed_back", JobStatus.FAILED: EXHAUSTED}
    for claim in claims:
        trace_attempt(claim, outcomes[done.get(claim.job.id)])
    waiting = sorted(job_id for job_id, status in done.items() if status is JobStatus.QUEUED)
    if waiting:
        logger.info("%s: handed back", ", ".join(waiting))
        _publish_hint(runtime, waiting)


def _publish_hint(runtime: WorkerRuntime, job_ids: Sequence[str] = ()) -> None:
    """Tell workers that jobs wait. Where that fails the reaper will."""
    queue = JobQueue(runtime.settings.broker_address())
    try:
        queue.publish(job_ids[0] if job_ids else runtime.worker_id, 0)
        runtime.repository.mark_published(job_ids)
    except (QueueError, SQLAlchemyError) as error:
        logger.info("the reaper will tell of waiting jobs: %s", error)
    finally:
        queue.close()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _has_broken_the_device(error: Exception) -> bool:
    """Whether an error leaves the GPU context unusable, so that only a new process can go on."""
    if _is_out_of_memory(error):
        return False
    return "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"
