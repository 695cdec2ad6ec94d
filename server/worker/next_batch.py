"""The jobs of the next batch, claimed while the present one is sampled: the GPU is not to wait for the job table."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from sqlalchemy.exc import SQLAlchemyError

from server.jobs.repository import Claim

__all__ = ["NextBatch"]

logger = logging.getLogger(__name__)
_AHEAD_S = 1.0
"""Not sooner before the present batch is over: until then other workers and more urgent jobs may come."""


class NextBatch:
    """Context manager around a worker's batches; leaving it gives back what was claimed and not taken.

    Args:
        claim: Claims the jobs of a batch, and begins to renew their leases.
        claim_ahead: The same beside a batch that is sampled; called by a thread of this object.
        hand_back: Lets other workers have them.
        until: On the steady clock: nothing is claimed for batches that would begin later.
    """

    def __init__(
        self,
        *,
        claim: Callable[[], list[Claim]],
        claim_ahead: Callable[[], list[Claim]],
        hand_back: Callable[[list[Claim]], None],
        until: float,
    ) -> None:
        self._claim, self._claim_ahead, self._hand_back = claim, claim_ahead, hand_back
        self._until = until
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="claim")
        self._looking: Future[list[Claim]] | None = None
        self._is_time = threading.Event()
        self._is_over = False

    def __enter__(self) -> "NextBatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.give_back()
        finally:
            self._thread.shutdown()

    @property
    def is_looked_for(self) -> bool:
        """Whether its jobs are claimed, or about to be."""
        return self._looking is not None

    def look_before(self, seconds: float | None) -> None:
        """Claim in the background, at most a second before so many seconds are over; None: nobody knows, so do not."""
        if seconds is not None and self._looking is None and time.monotonic() + seconds < self._until:
            self._is_time.clear()
            self._looking = self._thread.submit(self._look, max(0.0, seconds - _AHEAD_S))

    def take(self) -> list[Claim]:
        """The jobs of the next batch, whose leases are renewed from now on; none where none waits.

        Raises:
            SQLAlchemyError: The job table cannot be used.
        """
        looking, self._looking = self._looking, None
        self._is_time.set()
        return (looking.result() if looking is not None else []) or self._claim()

    def give_back(self) -> None:
        """Claim no more, and let others have what was claimed."""
        looking, self._looking, self._is_over = self._looking, None, True
        self._is_time.set()
        if looking is None:
            return
        try:
            claims = looking.result()
        except SQLAlchemyError as error:
            logger.warning("nothing is known of jobs that were to be claimed: %s", error)
        else:
            if claims:
                self._hand_back(claims)

    def _look(self, pause_s: float) -> list[Claim]:
        self._is_time.wait(pause_s)
        return [] if self._is_over else self._claim_ahead()
