"""From samples to published videos: let encoders make the files, and commit; while the next batch is sampled."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy.exc import SQLAlchemyError

from medsora.errors import BackendError, CheckpointError, MedsoraError
from medsora.provenance import clip_metadata
from medsora.request import GenerationRequest
from server.checkpoints import ServedCheckpoint
from server.datasets.repository import ClipOrder
from server.errors import without_folders
from server.jobs.repository import Claim, FinishedWork, log_fields
from server.logs import bound
from server.objects import StorageUnavailableError
from server.storage import StorageFullError, Variant
from server.worker.attempts import trace_attempt
from server.worker.dataset_clips import ClipDroppedError
from server.worker.encoders import EncoderLostError
from server.worker.encoding import EncodingOrder
from server.worker.progress import ClaimKeeper, ClaimLost, JobCanceled
from server.worker.runtime import WorkerRuntime
from server.worker.sources import SourceError

__all__ = ["Finisher", "SampledBatch", "close_canceled", "explain", "leave_to_reaper", "names_of", "settle"]

Frames = np.ndarray[Any, np.dtype[np.uint8]]
T = TypeVar("T")

logger = logging.getLogger(__name__)
_COMMIT_EVERY_S = 0.05
"""Clips of a batch that become ready within so short a time are committed together: a commit waits for the disk."""
_MOST_BATCHES = 2
_MOST_BYTES = 512 * 2**20
"""Of frames, of all batches that are being finished, where it is more than one."""


@dataclass(frozen=True, kw_only=True)
class SampledBatch:
    """Clips that were sampled together; the lists go side by side."""

    checkpoint: ServedCheckpoint
    claims: list[Claim]
    requests: list[GenerationRequest]
    frames: list[Frames]
    """uint8 RGB ``(frames, height, width, 3)`` of each."""
    sampling_s: float
    """Seconds that sampler and decoder took for all of them."""


class Finisher:
    """Context manager that finishes batches, two at a time at most; leaving it waits for them.

    Two, so that encoders that have no clip of the first left to do begin with the second.
    """

    def __init__(self, runtime: WorkerRuntime, keeper: ClaimKeeper) -> None:
        self._runtime, self._keeper = runtime, keeper
        self._encoders = ThreadPoolExecutor(runtime.encoders.lanes, thread_name_prefix="encode")
        self._coordinators = ThreadPoolExecutor(_MOST_BATCHES, thread_name_prefix="finish")
        self._unfinished: dict[Future[None], int] = {}  # with the bytes of their frames

    def __enter__(self) -> "Finisher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            self._coordinators.shutdown()
            self._encoders.shutdown()

    def submit(self, batch: SampledBatch) -> None:
        """Finish a batch; returns once no more than one other is being finished, or none where they are large."""
        size = sum(frames.nbytes for frames in batch.frames)
        while not self._has_room(size):
            wait(self._unfinished, return_when=FIRST_COMPLETED)
        self._unfinished[self._coordinators.submit(self._finish, batch)] = size

    def wait(self) -> bool:
        """Wait until no batch is being finished; returns whether there was one."""
        was_busy = bool(self._unfinished)
        wait(self._unfinished)
        self._unfinished.clear()
        return was_busy

    def _has_room(self, size: int) -> bool:
        self._unfinished = {future: others for future, others in self._unfinished.items() if not future.done()}
        held = sum(self._unfinished.values())
        return not self._unfinished or (len(self._unfinished) < _MOST_BATCHES and held + size <= _MOST_BYTES)

    def _finish(self, batch: SampledBatch) -> None:
        """Finish a batch. Never raises: whatever goes wrong here is no fault of the batch that is sampled meanwhile."""
        futures: dict[Future[FinishedWork | Exception], Claim] = {}
        try:
            self._count(batch.checkpoint.name, len(batch.claims))
            try:
                orders = settle(lambda: self._runtime.datasets.orders_of([claim.job.id for claim in batch.claims]))
            except SQLAlchemyError as error:
                self._publish([(claim, error) for claim in batch.claims])
                return
            for number, claim in enumerate(batch.claims):
                futures[self._encoders.submit(self._make_files, batch, number, orders)] = claim
            pending = set(futures)
            while pending:
                wait(pending, return_when=FIRST_COMPLETED)
                done, pending = wait(pending, timeout=_COMMIT_EVERY_S)
                self._publish([(futures[future], future.result()) for future in done])
        except Exception:
            logger.exception("a batch is left to the reaper where it is not finished: %s", names_of(batch.claims))
            wait(futures)
            self._keeper.let_go(batch.claims)

    def _make_files(
        self, batch: SampledBatch, number: int, orders: Mapping[str, ClipOrder]
    ) -> FinishedWork | Exception:
        """Make and store the files of a clip; returns why not, where it was not."""
        claim, request, frames = batch.claims[number], batch.requests[number], batch.frames[number]
        end = self._keeper.end_of(claim)
        if end is not None:
            return end
        order = EncodingOrder(
            claim=claim,
            metadata=clip_metadata(request, model=batch.checkpoint.name, model_sha256=batch.checkpoint.sha256),
            checkpoint=batch.checkpoint.directory,
            dataset=orders.get(claim.job.id),
        )
        try:
            clip = self._runtime.encoders.run(order, frames)
        except EncoderLostError as error:
            with suppress(OSError):  # the reaper removes what stays
                self._runtime.store.remove_attempt(claim.job.id, claim.token)
            return error
        except Exception as error:
            return error
        video = clip.files[Variant.VIDEO]
        return FinishedWork(
            artifact=video.name,
            size_bytes=video.size_bytes,
            sha256=video.sha256,
            thumbnail_sha256=clip.files[Variant.THUMBNAIL].sha256,
            spritesheet_sha256=clip.files[Variant.SPRITESHEET].sha256,
            sampling_s=batch.sampling_s,
            encode_s=clip.encode_s,
            store_s=clip.store_s,
            batch_size=len(batch.claims),
        )

    def publish(self, claim: Claim, work: FinishedWork) -> None:
        """Publish the result of a job that was made by itself."""
        self._count(claim.job.model, 1)
        self._publish([(claim, work)])

    def _count(self, model: str, size: int) -> None:
        try:
            self._runtime.repository.count_batch(model, size)
        except SQLAlchemyError as error:
            logger.warning("a batch of %d is not counted: %s", size, error)

    def _publish(self, results: Sequence[tuple[Claim, FinishedWork | Exception]]) -> None:
        finished = [(claim, work) for claim, work in results if isinstance(work, FinishedWork)]
        try:
            if finished:
                rows = [(claim.job.id, claim.token, work) for claim, work in finished]
                made_s = time.time()
                published = settle(lambda: self._runtime.repository.succeed_all(rows))
                for claim, made in finished:
                    with bound(**log_fields(claim.job)):
                        is_taken = claim.job.id in published
                        trace_attempt(claim, "succeeded" if is_taken else "canceled", work=made, made_s=made_s)
                        if not is_taken:
                            _withdraw(self._runtime, claim, made.artifact)
                            continue
                        about = {name: round(getattr(made, name), 6) for name in ("sampling_s", "encode_s", "store_s")}
                        logger.info("%s is made", claim.job.id, extra={**about, "batch_size": made.batch_size})
            for claim, work in results:
                if isinstance(work, (JobCanceled, ClaimLost)):
                    close_canceled(self._runtime, self._keeper, claim, work)
                elif isinstance(work, StorageUnavailableError):
                    self._runtime.storage.is_suspect = True
                    self._hand_back(claim, work, uses_attempt=False)
                elif isinstance(work, EncoderLostError):
                    # Which clip ended the process is not known: each runs alone the next time.
                    self._hand_back(claim, work, uses_attempt=True)
                elif isinstance(work, SQLAlchemyError):
                    leave_to_reaper([claim], work)
                elif isinstance(work, Exception):
                    self._fail(claim, work)
        except SQLAlchemyError as error:
            leave_to_reaper([claim for claim, _ in results], error)
        finally:
            self._keeper.let_go([claim for claim, _ in results])

    def _hand_back(self, claim: Claim, error: Exception, *, uses_attempt: bool) -> None:
        """The clip is made again, by this worker or another one."""
        with bound(**log_fields(claim.job)):
            logger.error("%s is handed back: %s", claim.job.id, error)
        key = (claim.job.id, claim.token)
        hand_back = partial(self._runtime.repository.hand_back_all, [key], uses_attempt=uses_attempt)
        if not settle(hand_back):
            settle(lambda: self._runtime.repository.finish_cancel(*key))
        trace_attempt(claim, "lost" if uses_attempt else "handed_back")

    def _fail(self, claim: Claim, error: Exception) -> None:
        code, message = explain(error)
        with bound(**log_fields(claim.job)):
            if isinstance(error, ClipDroppedError):
                logger.info("%s is dropped: %s", claim.job.id, code)
            else:
                logger.error("%s failed: %s", claim.job.id, code, exc_info=error)
        settle(lambda: self._runtime.repository.fail(claim.job.id, claim.token, code=code, message=message))
        trace_attempt(claim, code)


def _withdraw(runtime: WorkerRuntime, claim: Claim, artifact: str) -> None:
    """The result was not taken: remove its files, unless it was taken after all and only the answer was lost."""
    published, _ = runtime.repository.referenced([claim.job.id]).get(claim.job.id, (None, None))
    if published == artifact:
        return
    with suppress(OSError):  # the reaper removes what stays
        runtime.store.remove_attempt(claim.job.id, claim.token)
    settle(lambda: runtime.repository.finish_cancel(claim.job.id, claim.token))
    logger.warning("the result of %s was not wanted any more", claim.job.id)


def close_canceled(runtime: WorkerRuntime, keeper: ClaimKeeper, claim: Claim, reason: JobCanceled | ClaimLost) -> None:
    """Settle a job that is not to go on."""
    if isinstance(reason, JobCanceled):
        try:
            settle(lambda: runtime.repository.finish_cancel(claim.job.id, claim.token))
            logger.info("%s was cancelled", claim.job.id)
        except SQLAlchemyError as error:
            leave_to_reaper([claim], error)
    else:
        logger.warning("%s belongs to another worker now", claim.job.id)
    trace_attempt(claim, "canceled" if isinstance(reason, JobCanceled) else "lost")
    keeper.let_go([claim])


def leave_to_reaper(claims: Sequence[Claim], error: SQLAlchemyError) -> None:
    """Nothing is wrong with these jobs, and what the table says of them now is unknown: their leases run out."""
    logger.error("left to the reaper, for the job table cannot be used: %s: %s", names_of(claims), error)


def names_of(claims: Sequence[Claim]) -> str:
    """The ids of the jobs, for a line of the log."""
    return ", ".join(claim.job.id for claim in claims)


def settle(action: Callable[[], T]) -> T:
    """Try a last write on jobs a few times: losing it would mean to do the whole work again.

    Raises:
        SQLAlchemyError: The job table cannot be written for seconds.
    """
    for pause_s in (0.2, 1.0, 3.0):
        try:
            return action()
        except SQLAlchemyError as error:
            logger.warning("the job table cannot be written: %s", error)
            time.sleep(pause_s)
    return action()


def explain(error: Exception) -> tuple[str, str]:
    """(code, message) for the client. Messages of foreign errors may hold paths and stay in the log."""
    if isinstance(error, StorageFullError):
        return "storage_full", "There was no room to store the video."
    if isinstance(error, ClipDroppedError):
        return error.code, str(error)
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
