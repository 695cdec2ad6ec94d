"""Group commit: whoever comes meanwhile goes together, and nobody fails because of another."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from server.jobs import group_commit
from server.jobs.group_commit import GroupCommit


class Ledger:
    """Notes what was committed together. Item 0 is under way until it is let go."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.has_begun, self.let_go = threading.Event(), threading.Event()
        self.commit_together = GroupCommit(self.commit)

    def commit(self, items: Sequence[int]) -> list[str | Exception]:
        self.groups.append(list(items))
        if 0 in items:
            self.has_begun.set()
            assert self.let_go.wait(10)
        self.may_fail(items)
        return [self.outcome(item) for item in items]

    def may_fail(self, items: Sequence[int]) -> None: ...

    def outcome(self, item: int) -> str | Exception:
        return f"{item} is written"

    def run(self, others: int) -> dict[int, Any]:
        """Of each of so many threads, from 1, what it was told; all come while 0 is under way."""
        told: dict[int, Any] = {}

        def ask(item: int) -> None:
            try:
                told[item] = self.commit_together(item)
            except Exception as error:
                told[item] = error
            except SystemExit:
                pass

        first = threading.Thread(target=ask, args=(0,))
        first.start()
        assert self.has_begun.wait(10)
        threads = [threading.Thread(target=ask, args=(item,)) for item in range(1, others + 1)]
        for number, thread in enumerate(threads, start=1):
            thread.start()
            while len(self.commit_together._waiting) < number:
                assert thread.is_alive()
        self.let_go.set()
        for thread in (first, *threads):
            thread.join(10)
            assert not thread.is_alive()
        return told


def test_whoever_comes_during_a_commit_goes_with_the_next_one() -> None:
    ledger = Ledger()
    assert ledger.run(5) == {item: f"{item} is written" for item in range(6)}
    assert ledger.groups == [[0], [1, 2, 3, 4, 5]]
    assert ledger.commit_together(9) == "9 is written"


def test_a_transaction_does_not_grow_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "MOST_AT_ONCE", 3)
    ledger = Ledger()
    assert ledger.run(7) == {item: f"{item} is written" for item in range(8)}
    assert ledger.groups == [[0], [1, 2, 3], [4, 5, 6], [7]]


def test_who_is_left_out_is_told_alone() -> None:
    class Choosy(Ledger):
        def outcome(self, item: int) -> str | Exception:
            return ValueError("not this one") if item == 2 else super().outcome(item)

    told = Choosy().run(3)
    assert isinstance(told.pop(2), ValueError)
    assert told == {item: f"{item} is written" for item in (0, 1, 3)}


def test_all_are_told_when_the_database_is_to_blame() -> None:
    """Once: each has waited long enough."""

    class Locked(Ledger):
        def may_fail(self, items: Sequence[int]) -> None:
            if 0 not in items:
                raise OperationalError("BEGIN", None, ValueError("database is locked"))

    ledger = Locked()
    told = ledger.run(3)
    assert told.pop(0) == "0 is written"
    assert [type(error) for error in told.values()] == [OperationalError] * 3
    assert {str(error).splitlines()[0] for error in told.values()} == {"(builtins.ValueError) database is locked"}
    assert len(set(map(id, told.values()))) == 3  # raised in several threads, one would collect their tracebacks
    assert ledger.groups == [[0], [1, 2, 3]]


def test_what_cannot_be_written_fails_alone() -> None:
    class Poisoned(Ledger):
        def may_fail(self, items: Sequence[int]) -> None:
            if 2 in items:
                raise ValueError("this cannot be written")

    ledger = Poisoned()
    told = ledger.run(3)
    assert str(told.pop(2)) == "this cannot be written"
    assert told == {item: f"{item} is written" for item in (0, 1, 3)}
    assert ledger.groups[:2] == [[0], [1, 2, 3]]
    assert sorted(ledger.groups[2:]) == [[1], [2], [3]]


def test_what_cannot_be_written_and_is_alone_is_tried_once() -> None:
    class Poisoned(Ledger):
        def may_fail(self, items: Sequence[int]) -> None:
            raise ValueError("this cannot be written")

    ledger = Poisoned()
    for _ in range(2):
        with pytest.raises(ValueError, match="this cannot be written"):
            ledger.commit_together(1)
    assert ledger.groups == [[1], [1]]


def test_whoever_is_left_by_a_commit_that_is_stopped_goes_on_alone() -> None:
    class Stopped(Ledger):
        def may_fail(self, items: Sequence[int]) -> None:
            if len(items) > 1:
                raise SystemExit

    ledger = Stopped()
    told = ledger.run(3)
    assert told[0] == "0 is written"
    assert len(told) == 3  # one of the threads was told to end, and has
    assert set(told.values()) <= {f"{item} is written" for item in range(4)}


def test_an_answer_too_few_is_no_reason_to_wait_for_ever() -> None:
    class Forgetful(Ledger):
        def commit(self, items: Sequence[int]) -> list[str | Exception]:
            return super().commit(items)[: max(1, len(items) - 1)]

    assert Forgetful().run(3) == {item: f"{item} is written" for item in range(4)}
