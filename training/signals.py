"""Signals as polite requests: the loop looks whether one came, and stops where it can save."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["stop_on_signals"]

WATCHED = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], int]]:
    """Catch SIGTERM and SIGINT: yields a function that says which one came first, 0 for none."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {}
    try:
        for number in WATCHED:
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals are somebody else's business
        pass
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
