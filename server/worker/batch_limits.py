"""How many clips a sampling process takes at once: what was measured to pay, and what was found not to fit."""

import time
from collections.abc import Callable, Hashable, Sequence

__all__ = ["BatchLimits", "best_size"]

_REMEMBERED_S = 600.0
_WORTH = 0.97
_LONGEST_S = 0.5


class BatchLimits:
    """Largest batch by model and shape.

    Args:
        most: Largest batch of a model of which nothing was measured.
        remembered_s: Seconds after which a size that did not fit is tried again: others may have freed the memory.
    """

    def __init__(self, most: int, *, remembered_s: float = _REMEMBERED_S) -> None:
        self._most = most
        self._remembered_s = remembered_s
        self._best: dict[str, int] = {}
        self._lowered: dict[tuple[str, Hashable], tuple[int, float]] = {}

    def of(self, model: str, shape: Hashable) -> int:
        """Most clips of this model and shape to take at once."""
        best = self._best.get(model, self._most)
        limit, until = self._lowered.get((model, shape), (best, 0.0))
        if until <= time.monotonic():
            self._lowered.pop((model, shape), None)
            return best
        return min(limit, best)

    def lower(self, model: str, shape: Hashable, limit: int) -> None:
        """Take at most ``limit`` for a while: more did not fit into the memory."""
        self._lowered[model, shape] = (max(1, limit), time.monotonic() + self._remembered_s)

    def set_best(self, model: str, size: int) -> None:
        """Take at most ``size`` clips of this model at once: more does not pay."""
        self._best[model] = size


def best_size(sizes: Sequence[int], seconds_of: Callable[[int], float]) -> int:
    """The smallest of these rising batch sizes after which the time for a clip hardly falls.

    Args:
        seconds_of: Measures a batch. Not called any more once a batch took half a second: clips that long gain little
            from company, and everybody in a batch waits for all of it.
    """
    best, best_pace = sizes[0], float("inf")
    for size in sizes:
        seconds = seconds_of(size)
        if seconds / size >= _WORTH * best_pace:
            break
        best, best_pace = size, seconds / size
        if seconds > _LONGEST_S:
            break
    return best
