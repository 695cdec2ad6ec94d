"""Waiting for conditions, with a deadline."""

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["wait_until"]

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T], *, timeout_s: float, what: str | Callable[[], str], every_s: float = 0.02
) -> T:
    """Wait for something true, asking every so many seconds, and return it; ``what`` says what never came."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(every_s)
