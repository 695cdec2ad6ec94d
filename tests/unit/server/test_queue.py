"""Publishing: fast whatever the broker does, and never a failure of the request."""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import cast

import pytest

from server.jobs.queue import BackgroundPublisher, JobQueue, QueueError


@pytest.fixture
def silent_broker() -> Iterator[str]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


@pytest.mark.parametrize("action", ["publish", "length"])
def test_silent_broker_is_given_up_quickly(silent_broker: str, action: str) -> None:
    queue = JobQueue(silent_broker)
    began = time.monotonic()
    with pytest.raises(QueueError, match="failed"):
        queue.publish("video_x", 0) if action == "publish" else queue.length()
    assert time.monotonic() - began < 3.0
    queue.close()


def test_dead_broker_is_given_up_at_once() -> None:
    queue = JobQueue("redis://127.0.0.1:1/0")
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(QueueError, match=r"publishing failed: .*refused"):
            queue.publish("video_x", 0)
    assert time.monotonic() - began < 1.0
    queue.close()


@pytest.mark.parametrize(("waiting", "published"), [(0, 16), (10, 6), (16, 0), (40, 0)])
def test_no_more_hints_than_are_of_use(monkeypatch: pytest.MonkeyPatch, waiting: int, published: int) -> None:
    queue = JobQueue("redis://127.0.0.1:1/0")
    sent: list[str] = []
    monkeypatch.setattr(queue, "length", lambda: waiting)
    monkeypatch.setattr(queue, "publish", lambda job_id, attempt: sent.append(job_id))
    queue.publish_hints([(f"video_{number}", 0) for number in range(100)])
    queue.close()
    assert sent == [f"video_{number}" for number in range(published)]


class FakeQueue:
    """Takes what it is given, until it is told to fail."""

    def __init__(self) -> None:
        self.published: list[str] = []
        self.is_failing = False
        self.gate = threading.Event()
        self.gate.set()

    def publish(self, job_id: str, attempt: int) -> None:
        self.gate.wait(5.0)
        if self.is_failing:
            raise QueueError("down")
        self.published.append(job_id)

    def publish_hints(self, jobs: Sequence[tuple[str, int]]) -> None:
        for job_id, attempt in jobs:
            self.publish(job_id, attempt)

    def close(self) -> None:
        pass


def test_publisher_publishes_and_records() -> None:
    queue, marked = FakeQueue(), list[str]()
    publisher = BackgroundPublisher(cast(JobQueue, queue), marked.extend)
    for name in "abc":
        publisher.submit(name)
    publisher.close()
    assert queue.published == marked == ["a", "b", "c"]


def test_publisher_outlives_a_broker_that_is_down() -> None:
    queue, marked = FakeQueue(), list[str]()
    publisher = BackgroundPublisher(cast(JobQueue, queue), marked.extend)
    queue.is_failing = True
    publisher.submit("lost")
    time.sleep(0.1)
    queue.is_failing = False
    publisher.submit("kept")
    publisher.close()
    assert marked == ["kept"]


def test_publisher_never_makes_a_request_wait() -> None:
    queue = FakeQueue()
    queue.gate.clear()

    def mark(ids: Sequence[str]) -> None:
        del ids

    publisher = BackgroundPublisher(cast(JobQueue, queue), mark, capacity=2)
    began = time.monotonic()
    for number in range(10):
        publisher.submit(str(number))
    assert time.monotonic() - began < 0.5
    queue.gate.set()
    publisher.close()
    assert len(queue.published) < 10
