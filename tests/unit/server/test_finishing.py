"""How many batches are being finished at once."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from celery.exceptions import SoftTimeLimitExceeded
from waiting import wait_until

from server.worker.finishing import Finisher, SampledBatch


class SlowFinisher(Finisher):
    """Finishes a batch when it is let."""

    def __init__(self) -> None:
        runtime: Any = SimpleNamespace(encoders=SimpleNamespace(lanes=1))
        super().__init__(runtime, cast(Any, None))
        self.may_end: dict[int, threading.Event] = {}
        self.begun: list[int] = []
        self.ended: list[int] = []

    def _finish(self, batch: SampledBatch) -> None:
        number = int(batch.sampling_s)
        self.begun.append(number)
        assert self.may_end[number].wait(20)
        self.ended.append(number)

    def begin(self, number: int) -> None:
        self.may_end[number] = threading.Event()
        frames = [np.zeros((1, 2, 2, 3), np.uint8)] * 2
        self.submit(SampledBatch(checkpoint=cast(Any, None), claims=[], requests=[], frames=frames, sampling_s=number))


def waits(action: Callable[[], None]) -> threading.Thread:
    """Begin what has to wait for something."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive(), "it did not wait"
    return thread


def test_two_batches_are_finished_at_once_and_the_third_when_either_is_done() -> None:
    with SlowFinisher() as finisher:
        finisher.begin(0)
        finisher.begin(1)
        wait_until(lambda: sorted(finisher.begun) == [0, 1], timeout_s=10, what="both of them")
        third = waits(lambda: finisher.begin(2))
        finisher.may_end[1].set()
        third.join(10)
        assert not third.is_alive()
        assert finisher.ended == [1]
        finisher.may_end[0].set()
        finisher.may_end[2].set()
        assert finisher.wait()
        assert not finisher.wait(), "there is none any more"
    assert sorted(finisher.ended) == [0, 1, 2]


def test_large_ones_are_finished_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.worker.finishing._MOST_BYTES", 2 * 24 - 1)
    with SlowFinisher() as finisher:
        finisher.begin(0)
        second = waits(lambda: finisher.begin(1))
        finisher.may_end[0].set()
        second.join(10)
        assert not second.is_alive()
        finisher.may_end[1].set()


def test_whatever_ends_the_work_waits_for_all_that_are_being_finished() -> None:
    finisher = SlowFinisher()

    def break_off() -> None:
        with finisher:
            finisher.begin(0)
            finisher.begin(1)
            for event in finisher.may_end.values():
                threading.Timer(0.1, event.set).start()
            raise SoftTimeLimitExceeded

    with pytest.raises(SoftTimeLimitExceeded):
        break_off()
    assert sorted(finisher.ended) == [0, 1]
