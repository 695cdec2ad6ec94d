"""The live end of a claim: renews the lease, writes progress, and stops the sampler when it must stop."""

import logging
import threading
import time
from types import TracebackType

from sqlalchemy.exc import SQLAlchemyError

from medsora.errors import GenerationCanceled
from server.jobs.repository import Claim, JobRepository

__all__ = ["ClaimKeeper", "ClaimLost", "JobCanceled", "WorkerStopping"]

logger = logging.getLogger(__name__)
_ANNOUNCE_EVERY_S = 0.2


class JobCanceled(GenerationCanceled):
    """The client cancelled the job."""


class ClaimLost(GenerationCanceled):
    """Somebody else owns the job now, or may soon: the lease could not be renewed in time."""


class WorkerStopping(GenerationCanceled):
    """This worker has been told to stop; the job is for another one."""


class ClaimKeeper:
    """Context manager around the work on one claimed job.

    A thread renews the lease while a step takes long; :meth:`on_step` does so between steps.

    Args:
        lease_s: Seconds that the claim lasts without renewal.
        heartbeat_s: Seconds between renewals by the thread.
        progress_interval_s: Least seconds between two renewals by :meth:`on_step`.
        stopping: Set when this worker is to stop.
    """

    def __init__(
        self,
        repository: JobRepository,
        claim: Claim,
        *,
        lease_s: float,
        heartbeat_s: float,
        progress_interval_s: float,
        stopping: threading.Event,
    ) -> None:
        self._repository, self._claim = repository, claim
        self._lease_s, self._heartbeat_s = lease_s, heartbeat_s
        self._progress_interval_s = progress_interval_s
        self._stopping = stopping
        self._steps_done = 0
        self._canceled = False
        self._lost = False
        # The steady clock of this process measures only its own silence; leases are the database's to judge.
        self._renewed_at = time.monotonic()
        self._announced_at = 0.0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "ClaimKeeper":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def on_step(self, steps_done: int, num_steps: int) -> None:
        """Callback of the sampler. Of a clip in several windows ``num_steps`` counts those of all.

        Raises:
            JobCanceled, ClaimLost, WorkerStopping: The sampler must stop now.
        """
        # the row counts those of one window
        self._steps_done = steps_done * self._claim.job.num_inference_steps // num_steps
        if steps_done == 1 or time.monotonic() - self._renewed_at >= self._progress_interval_s:
            # Those who follow the job look a few times a second: they need not be told of every step.
            announce = steps_done == num_steps or time.monotonic() - self._announced_at >= _ANNOUNCE_EVERY_S
            if announce:
                self._announced_at = time.monotonic()
            self._renew(announce=announce)
        self._raise_if_over()

    def check(self) -> None:
        """Ask the database whether the job is still ours and wanted.

        Raises:
            JobCanceled, ClaimLost, WorkerStopping: It is not.
        """
        self._renew()
        self._raise_if_over()

    def _raise_if_over(self) -> None:
        if self._lost:
            raise ClaimLost(f"the claim on {self._claim.job.id} is lost")
        if self._canceled:
            raise JobCanceled(f"{self._claim.job.id} was cancelled")
        if self._stopping.is_set():
            raise WorkerStopping("the worker is stopping")

    def _beat(self) -> None:
        while not self._closed.wait(self._heartbeat_s):
            if time.monotonic() - self._renewed_at >= self._heartbeat_s / 2:
                self._renew()

    def _renew(self, *, announce: bool = False) -> None:
        with self._lock:
            began = time.monotonic()
            try:
                answer = self._repository.renew(
                    self._claim.job.id, self._claim.token, steps_done=self._steps_done, announce=announce
                )
            except SQLAlchemyError as error:
                logger.warning("the lease of %s could not be renewed: %s", self._claim.job.id, error)
                self._lost = self._lost or began - self._renewed_at > self._lease_s
                return
            self._renewed_at = began
            self._lost = self._lost or answer is None
            self._canceled = self._canceled or answer is True
