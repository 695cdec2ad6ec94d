"""Group commit: what several threads want written at the same time goes into one transaction.

A commit waits for the disk, and writers to SQLite wait for one another. Whoever comes while a commit is under way goes
with the next one, together with all others who have come meanwhile; who is alone waits for nobody.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from sqlalchemy import exc

__all__ = ["GroupCommit"]

MOST_AT_ONCE = 64
"""So that a transaction stays short: others wait for it."""
_OF_THE_DATABASE = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Entry(Generic[_Item]):
    def __init__(self, item: _Item) -> None:
        self.item = item
        self.outcome: object = None
        self.is_decided = self.must_go_alone = False


class GroupCommit(Generic[_Item, _Result]):
    """Writes items of several threads together. Each call returns when its own item is committed: after the commit that
    is under way, and its own.

    Args:
        commit: Writes items, in the order of their coming, within one transaction; returns of each its result, or the
            error for which it was left out. When it raises, nothing is written: all are told so when the database is to
            blame, else each is tried alone, so that none fails because of another.
    """

    def __init__(self, commit: Callable[[Sequence[_Item]], Sequence[_Result | Exception]]) -> None:
        self._commit = commit
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._waiting: list[_Entry[_Item]] = []

    def __call__(self, item: _Item) -> _Result:
        """Write an item.

        Raises:
            Exception: It was left out, or nothing could be written.
        """
        entry = _Entry(item)
        with self._lock:
            self._waiting.append(entry)
        with self._turn:
            while not (entry.is_decided or entry.must_go_alone):
                with self._lock:
                    group, self._waiting = self._waiting[:MOST_AT_ONCE], self._waiting[MOST_AT_ONCE:]
                self._decide(group)
            if entry.must_go_alone:
                entry.outcome = self._commit([item])[0]
        if isinstance(entry.outcome, Exception):
            raise entry.outcome
        return entry.outcome  # type: ignore[return-value]

    def _decide(self, group: Sequence[_Entry[_Item]]) -> None:
        try:
            told = list(zip(group, self._commit([entry.item for entry in group]), strict=True))
        except _OF_THE_DATABASE as error:
            # an error of its own each: one that is raised in several threads collects the tracebacks of all
            told = [(entry, copy.copy(error)) for entry in group]
        except BaseException as error:
            for entry in group:
                entry.must_go_alone = True
            if len(group) == 1 or not isinstance(error, Exception):
                raise
            return
        for entry, outcome in told:
            entry.outcome, entry.is_decided = outcome, True
