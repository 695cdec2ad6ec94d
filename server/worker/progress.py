"""The live end of claims: renews the leases, writes progress, and knows which jobs must not go on."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from sqlalchemy.exc import SQLAlchemyError

from medsora.errors import GenerationCanceled
from server.jobs.repository import Claim, JobRepository

__all__ = ["ClaimKeeper", "ClaimLost", "JobCanceled", "WorkerStopping"]

logger = logging.getLogger(__name__)
_ANNOUNCE_EVERY_S = 0.2
_PAUSE_FOR_WORK = 10.0
"""Seconds from one renewal because of progress to the next for each that the last one took. Those of many jobs take
long, and the sampler shares its interpreter with them."""
_MOST_PAUSE_S = 1.0
"""So that a cancellation is heard soon, however slow the database is."""


class JobCanceled(GenerationCanceled):
    """The client cancelled the job."""


class ClaimLost(GenerationCanceled):
    """Somebody else owns the job now, or may soon: the lease could not be renewed in time."""


class WorkerStopping(GenerationCanceled):
    """This worker has been told to stop; the job is for another one."""


@dataclass
class _Kept:
    """What is known of a claim. The steady clock of this process measures only its own silence."""

    claim: Claim
    renewed_at: float = field(default_factory=time.monotonic)
    steps_done: int = 0
    is_lost: bool = False
    is_canceled: bool = False


class ClaimKeeper:
    """Context manager around the work on claimed jobs: those being sampled, and those being stored.

    One thread renews all their leases in one transaction: at every step that was reported, but not more often than
    ``progress_interval_s``, and else at every heartbeat. The sampler never waits for the database.

    Args:
        lease_s: Seconds that a claim lasts without renewal.
        heartbeat_s: Seconds between renewals.
        progress_interval_s: Least seconds between two renewals because of progress. A tenth of the time at most goes
            into them, unless one takes more than a tenth of a second.
        giving_up: Set when this worker is to stop at once.
    """

    def __init__(
        self,
        repository: JobRepository,
        *,
        lease_s: float,
        heartbeat_s: float,
        progress_interval_s: float,
        giving_up: threading.Event,
    ) -> None:
        self._repository = repository
        self._lease_s, self._heartbeat_s = lease_s, heartbeat_s
        self._progress_interval_s = progress_interval_s
        self._giving_up = giving_up
        self._kept: dict[str, _Kept] = {}
        self._has_progress = False
        self._is_closed = False
        self._announced_at = 0.0
        self._changed = threading.Condition()
        self._renewing = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "ClaimKeeper":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def keep(self, claims: Sequence[Claim]) -> None:
        """Begin to renew these."""
        with self._changed:
            self._kept |= {claim.job.id: _Kept(claim) for claim in claims}

    def let_go(self, claims: Sequence[Claim]) -> None:
        """Renew these no more: they are settled, or somebody else's."""
        with self._changed:
            for claim in claims:
                if self._find(claim) is not None:
                    del self._kept[claim.job.id]

    def on_step(self, claims: Sequence[Claim], steps_done: int) -> None:
        """Note the progress of jobs that are sampled together; it is written soon.

        Raises:
            WorkerStopping: The sampler must stop now.
            JobCanceled, ClaimLost: So it must, for none of these jobs is to go on.
        """
        with self._changed:
            for claim in claims:
                kept = self._find(claim)
                if kept is not None:
                    kept.steps_done = steps_done
            self._has_progress = True
            self._changed.notify()
        self.raise_if_giving_up()
        ends = [self.end_of(claim) for claim in claims]
        if all(end is not None for end in ends) and ends[0] is not None:
            raise ends[0]

    def check(self, claim: Claim) -> None:
        """Ask the database whether a job is still ours and wanted.

        Raises:
            JobCanceled, ClaimLost, WorkerStopping: It is not.
        """
        self.renew()
        end = self.end_of(claim)
        if end is not None:
            raise end
        self.raise_if_giving_up()

    def raise_if_giving_up(self) -> None:
        """Raise WorkerStopping when this worker is to stop at once."""
        if self._giving_up.is_set():
            raise WorkerStopping("the worker is stopping")

    def end_of(self, claim: Claim) -> JobCanceled | ClaimLost | None:
        """Why a job is not to go on, as far as is known; None: it is."""
        kept = self._find(claim)
        if kept is None or kept.is_lost:
            return ClaimLost(f"the claim on {claim.job.id} is lost")
        if kept.is_canceled:
            return JobCanceled(f"{claim.job.id} was cancelled")
        return None

    def _find(self, claim: Claim) -> _Kept | None:
        """What is known of a claim. Of a job that was handed back, this worker may have a newer one by now."""
        kept = self._kept.get(claim.job.id)
        return kept if kept is not None and kept.claim.token == claim.token else None

    def renew(self) -> None:
        """Ask the database now whether the jobs are still ours and wanted, and write their progress."""
        with self._renewing:
            with self._changed:
                kept = [one for one in self._kept.values() if not one.is_lost]
                progress = {(one.claim.job.id, one.claim.token): one.steps_done for one in kept}
                announce = self._has_progress and time.monotonic() - self._announced_at >= _ANNOUNCE_EVERY_S
                self._has_progress = False
            if not progress:
                return
            began = time.monotonic()
            if announce:
                self._announced_at = began
            try:
                answers = self._repository.renew_all(progress, announce=announce)
            except SQLAlchemyError as error:
                logger.warning("the leases of %d jobs could not be renewed: %s", len(kept), error)
                for one in kept:
                    one.is_lost = one.is_lost or began - one.renewed_at > self._lease_s
                return
            for one in kept:
                one.renewed_at = began
                one.is_canceled = one.is_canceled or answers.get(one.claim.job.id, False)
                one.is_lost = one.claim.job.id not in answers

    def _beat(self) -> None:
        renewed_at = time.monotonic()
        pause_s = self._progress_interval_s
        while True:
            with self._changed:
                if not self._has_progress and not self._is_closed:
                    self._changed.wait(max(0.0, renewed_at + self._heartbeat_s - time.monotonic()))
                is_due = self._has_progress or time.monotonic() - renewed_at >= self._heartbeat_s
                rest_s = renewed_at + pause_s - time.monotonic()
                if self._has_progress and rest_s > 0 and not self._is_closed:
                    self._changed.wait_for(lambda: self._is_closed, rest_s)
                if self._is_closed:
                    return
            if is_due:
                renewed_at = time.monotonic()
                self.renew()
                took_s = time.monotonic() - renewed_at
                longest_s = min(_MOST_PAUSE_S, self._heartbeat_s)
                pause_s = max(self._progress_interval_s, min(longest_s, _PAUSE_FOR_WORK * took_s))
