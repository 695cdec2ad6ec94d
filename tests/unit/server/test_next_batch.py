"""Claims ahead of time: not too soon, not for a turn that ends, and never lost."""

import threading
import time
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from server.worker import next_batch
from server.worker.next_batch import NextBatch


class Table:
    """Stands for the job table: numbers for claims."""

    def __init__(self) -> None:
        self.claimed: list[list[Any]] = []
        self.claimed_ahead: list[list[Any]] = []
        self.given_back: list[list[Any]] = []
        self.error: Exception | None = None
        self.has_looked = threading.Event()

    def claim(self) -> list[Any]:
        if self.error is not None:
            raise self.error
        self.claimed.append([len(self.claimed)])
        return self.claimed[-1]

    def claim_ahead(self) -> list[Any]:
        self.has_looked.set()
        self.claimed_ahead.append(self.claim())
        return self.claimed_ahead[-1]


@pytest.fixture
def table() -> Table:
    return Table()


def following(table: Table, *, until: float = 1e12) -> NextBatch:
    return NextBatch(claim=table.claim, claim_ahead=table.claim_ahead, hand_back=table.given_back.append, until=until)


def test_without_a_look_the_jobs_are_claimed_when_they_are_taken(table: Table) -> None:
    with following(table) as batch:
        batch.look_before(None)
        assert not table.has_looked.wait(0.1)
        assert not batch.is_looked_for
        assert batch.take() == [0]
    assert table.claimed_ahead == table.given_back == []


def test_they_are_claimed_ahead(table: Table) -> None:
    with following(table) as batch:
        batch.look_before(0.5)
        assert table.has_looked.wait(5)
        assert batch.is_looked_for
        assert batch.take() == [0]
        assert not batch.is_looked_for
        assert batch.take() == [1]
    assert table.claimed_ahead == [[0]]
    assert table.given_back == []


def test_not_before_the_last_second(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_batch, "_AHEAD_S", 0.1)
    with following(table) as batch:
        began = time.monotonic()
        batch.look_before(0.5)
        assert table.has_looked.wait(5)
        assert time.monotonic() - began >= 0.4


def test_a_batch_that_ends_early_waits_for_nothing(table: Table) -> None:
    with following(table) as batch:
        batch.look_before(60.0)
        began = time.monotonic()
        assert batch.take() == [0]
        assert time.monotonic() - began < 5


def test_not_for_a_turn_that_is_over_by_then(table: Table) -> None:
    with following(table, until=time.monotonic() + 0.5) as batch:
        batch.look_before(0.8)
        assert not table.has_looked.wait(0.3)


def test_what_nobody_took_is_given_back(table: Table) -> None:
    with following(table) as batch:
        batch.look_before(0.0)
        assert table.has_looked.wait(5)
    assert table.given_back == [[0]]


def test_who_has_not_looked_yet_does_not_at_the_end(table: Table) -> None:
    with following(table) as batch:
        batch.look_before(60.0)
    assert table.claimed == table.given_back == []


def test_an_outage_is_told_to_who_takes_and_does_not_end_who_gives_back(table: Table) -> None:
    table.error = OperationalError("", None, Exception("gone"))
    with following(table) as batch:
        batch.look_before(0.0)
        with pytest.raises(OperationalError):
            batch.take()
        table.has_looked.clear()
        batch.look_before(0.0)
        assert table.has_looked.wait(5)
    assert table.given_back == []
