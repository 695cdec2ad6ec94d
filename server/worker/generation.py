"""One job from claim to commit: sample, encode, store, publish; or say why not.

Whatever happens, the job is settled here, unless the process dies or the database cannot be reached: then the
lease runs out and the reaper settles it.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy.exc import SQLAlchemyError

from medsora.errors import BackendError, CheckpointError, MedsoraError
from medsora.provenance import clip_metadata
from medsora.request import GenerationRequest
from medsora.video_io import write_mp4
from server.errors import without_folders
from server.jobs.queue import JobQueue, QueueError
from server.jobs.repository import Claim, FinishedWork, log_fields
from server.logs import note
from server.storage import ArtifactInfo, StorageFullError, Variant
from server.worker.pieces import is_made_at_once, make_in_pieces
from server.worker.preview import PreviewWriter
from server.worker.progress import ClaimKeeper, ClaimLost, JobCanceled, WorkerStopping
from server.worker.publishing import MADE_OF_FRAMES, write_checked, write_origin
from server.worker.runtime import WorkerRuntime
from server.worker.sources import SourceError
from server.worker.stills import write_spritesheet, write_thumbnail

__all__ = ["run_job"]

Frames = np.ndarray[Any, np.dtype[np.uint8]]

logger = logging.getLogger(__name__)


def run_job(runtime: WorkerRuntime, job_id: str) -> None:
    """Make the video of a job, if it is still to be made and nobody else is at it."""
    claim = runtime.repository.claim(job_id, worker=runtime.worker_id)
    if claim is None:
        logger.info("%s is not to be had: a second message, or it was cancelled", job_id)
        return
    note(**log_fields(claim.job))
    settings = runtime.settings
    keeper = ClaimKeeper(
        runtime.repository,
        claim,
        lease_s=settings.lease_s,
        heartbeat_s=settings.heartbeat_s,
        progress_interval_s=settings.progress_interval_s,
        stopping=runtime.stopping,
    )
    try:
        with keeper:
            work = _make(runtime, claim, keeper)
        if _settle(lambda: runtime.repository.succeed(job_id, claim.token, work)):
            about = {name: round(getattr(work, name), 6) for name in ("sampling_s", "encode_s", "store_s")}
            logger.info("%s is made", job_id, extra=about)
        else:
            _withdraw(runtime, claim, work.artifact)
    except JobCanceled:
        _settle(lambda: runtime.repository.finish_cancel(job_id, claim.token))
        logger.info("%s was cancelled", job_id)
    except ClaimLost:
        logger.warning("%s belongs to another worker now", job_id)
    except WorkerStopping:
        _hand_back(runtime, claim)
    except SQLAlchemyError as error:
        # Nothing is wrong with the job, and what the table says of it now is unknown: its lease runs out.
        logger.error("%s is left to the reaper: the job table cannot be written: %s", job_id, error)
    except Exception as error:
        code, message = _explain(error)
        logger.exception("%s failed: %s", job_id, code)
        _settle(lambda: runtime.repository.fail(job_id, claim.token, code=code, message=message))
        _leave_if_broken(error)


def _make(runtime: WorkerRuntime, claim: Claim, keeper: ClaimKeeper) -> FinishedWork:
    job = claim.job
    keeper.check()
    if runtime.store.free_bytes() < runtime.settings.min_free_bytes:
        raise StorageFullError("too little free disk space to begin")
    checkpoint, pipeline = runtime.pipeline(job.model)
    keeper.check()  # loading it, where that had failed at the start, may have taken minutes
    request = GenerationRequest(
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
    preview = PreviewWriter(runtime.repository, [claim], interval_s=runtime.settings.preview_interval_s)
    if not is_made_at_once(job, checkpoint.manifest):
        return make_in_pieces(
            runtime,
            claim,
            checkpoint,
            pipeline,
            request,
            on_step=keeper.on_step,
            check=keeper.check,
            preview=preview,
        )
    began = time.monotonic()
    frames = pipeline([request], on_step=keeper.on_step, preview=preview)[0]
    sampled = time.monotonic()
    keeper.check()
    metadata = clip_metadata(request, model=checkpoint.name, model_sha256=checkpoint.sha256)
    store_began = time.monotonic()
    try:
        stored, encode_s = _store(runtime, claim, frames, metadata)
    except BaseException:
        with suppress(OSError):  # the reaper removes what stays
            runtime.store.remove_attempt(job.id, claim.token)
        raise
    video = stored[Variant.VIDEO]
    return FinishedWork(
        artifact=video.name,
        size_bytes=video.size_bytes,
        sha256=video.sha256,
        thumbnail_sha256=stored[Variant.THUMBNAIL].sha256,
        spritesheet_sha256=stored[Variant.SPRITESHEET].sha256,
        sampling_s=sampled - began,
        encode_s=encode_s,
        store_s=time.monotonic() - store_began - encode_s,
    )


def _store(
    runtime: WorkerRuntime, claim: Claim, frames: Frames, metadata: Mapping[str, str]
) -> tuple[dict[Variant, ArtifactInfo], float]:
    """Write all files of a clip; returns what was written, and the seconds that encoding took."""
    job = claim.job
    encode_s = 0.0

    def write(variant: Variant, path: Path) -> None:
        nonlocal encode_s
        began = time.monotonic()
        if variant is Variant.VIDEO:
            write_mp4(path, frames, fps=job.fps, metadata=metadata)
        elif variant is Variant.THUMBNAIL:
            write_thumbnail(path, frames, metadata=metadata)
        else:
            write_spritesheet(path, frames, metadata=metadata)
        encode_s += time.monotonic() - began

    stored = {variant: write_checked(runtime, claim, variant, partial(write, variant)) for variant in MADE_OF_FRAMES}
    write_origin(runtime, claim, metadata, stored)
    return stored, encode_s


def _withdraw(runtime: WorkerRuntime, claim: Claim, artifact: str) -> None:
    """The result was not taken: remove its files, unless it was taken after all and only the answer was lost."""
    published, _ = runtime.repository.referenced([claim.job.id]).get(claim.job.id, (None, None))
    if published == artifact:
        return
    runtime.store.remove_attempt(claim.job.id, claim.token)
    _settle(lambda: runtime.repository.finish_cancel(claim.job.id, claim.token))
    logger.warning("the result of %s was not wanted any more", claim.job.id)


def _hand_back(runtime: WorkerRuntime, claim: Claim) -> None:
    job_id = claim.job.id
    if not _settle(lambda: runtime.repository.hand_back(job_id, claim.token)):
        _settle(lambda: runtime.repository.finish_cancel(job_id, claim.token))
        return
    logger.info("%s is handed back: this worker stops", job_id)
    queue = JobQueue(runtime.settings.broker_address())
    try:
        queue.publish(job_id, claim.token)
        runtime.repository.mark_published([job_id])
    except (QueueError, SQLAlchemyError) as error:
        logger.info("the reaper will publish %s: %s", job_id, error)
    finally:
        queue.close()


def _settle(action: Callable[[], bool]) -> bool:
    """Try a last write on a job a few times: losing it would mean to do the whole job again."""
    for pause_s in (0.2, 1.0, 3.0):
        try:
            return action()
        except SQLAlchemyError as error:
            logger.warning("the job table cannot be written: %s", error)
            time.sleep(pause_s)
    return action()


def _explain(error: Exception) -> tuple[str, str]:
    """(code, message) for the client. Messages of foreign errors may hold paths and stay in the log."""
    if isinstance(error, StorageFullError):
        return "storage_full", "There was no room to store the video."
    if isinstance(error, SourceError):
        return "source_invalid", str(error)
    if isinstance(error, CheckpointError):
        return "checkpoint_invalid", f"The model cannot be used: {without_folders(str(error))}"
    if isinstance(error, BackendError):
        return "device_unavailable", without_folders(str(error))
    if isinstance(error, SoftTimeLimitExceeded):
        return "time_limit_exceeded", "The video took longer than a job may take."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out_of_memory", "The device has too little free memory for this video."
    if isinstance(error, MedsoraError):
        return "generation_failed", f"The video could not be made: {without_folders(str(error))}"
    return "generation_failed", f"The video could not be made: {type(error).__name__}."


def _leave_if_broken(error: Exception) -> None:
    """End the process after an error that leaves the GPU context unusable; the pool starts a new one."""
    if type(error).__name__ == "OutOfMemoryError":
        import torch

        torch.cuda.empty_cache()
    elif "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
        logger.error("the GPU context is broken, this process ends")
        logging.shutdown()
        os._exit(70)
