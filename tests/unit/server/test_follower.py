"""One follower a process: everything arrives once and in order, and nobody slow holds up the others."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from sqlalchemy import event as sqlalchemy_event

from server.events.follower import Follower, Subscription, TooManyStreamsError, Update
from server.events.log import EventLog, NewEvent, emit_all
from server.jobs.database import Database
from server.jobs.repository import JobRepository

AddJob = Callable[..., str]
Run = Callable[[Callable[[Follower], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def run(database: Database, repository: JobRepository) -> Run:
    """Run a test with a follower that looks often and takes 50 streams."""

    def run_it(test: Callable[[Follower], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            follower = Follower(EventLog(database), repository, interval_s=0.01, max_streams=50)
            try:
                await test(follower)
            finally:
                await follower.stop()

        asyncio.run(main())

    return run_it


async def take(stream: Subscription, count: int) -> list[Update]:
    async with asyncio.timeout(10):
        updates = [await stream.pending.get() for _ in range(count)]
    assert None not in updates
    return [update for update in updates if update is not None]


def write(database: Database, count: int, *, subject: str = "s", tenant: str = "t", kind: str = "x.y") -> None:
    with database.write() as connection:
        events = [NewEvent(tenant=tenant, kind=kind, subject=subject, data={"n": n}) for n in range(count)]
        emit_all(connection, events)


def test_streams_hear_what_they_asked_for(run: Run, database: Database) -> None:
    async def test(follower: Follower) -> None:
        write(database, 3)  # before anybody listened
        one = await follower.subscribe(tenant="t", subject="s", previews=False)
        all_of_t = await follower.subscribe(tenant="t", subject=None, previews=True)
        all_of_u = await follower.subscribe(tenant="u", subject=None, previews=True)
        write(database, 600)  # more than a page
        write(database, 1, subject="s2")
        write(database, 1, kind="video.preview")
        write(database, 1, subject="s3", tenant="u")
        assert [update.data["n"] for update in await take(one, 600)] == list(range(600))
        assert len(await take(all_of_t, 602)) == 602
        assert [update.subject for update in await take(all_of_u, 1)] == ["s3"]
        await asyncio.sleep(0.05)
        assert one.pending.empty()
        assert all_of_t.pending.empty()

    run(test)


def test_one_query_a_look_however_many_listen(run: Run, database: Database) -> None:
    async def test(follower: Follower) -> None:
        streams = [await follower.subscribe(tenant="t", subject=f"s{n}", previews=False) for n in range(50)]
        with pytest.raises(TooManyStreamsError):
            await follower.subscribe(tenant="t", subject="s", previews=False)
        queries: list[str] = []
        sqlalchemy_event.listen(
            database.engine, "before_cursor_execute", lambda c, cu, statement, *rest: queries.append(statement)
        )
        await asyncio.sleep(0.3)
        looks = [query for query in queries if "FROM events" in query]
        assert 3 <= len(looks) <= 40
        assert len([query for query in queries if "jobs" in query]) <= 2
        for stream in streams:
            follower.unsubscribe(stream)
            follower.unsubscribe(stream)  # twice does no harm
        assert len(follower) == 0
        await asyncio.sleep(0.1)
        queries.clear()
        await asyncio.sleep(0.1)
        assert queries == []  # nobody listens: nobody looks
        again = await follower.subscribe(tenant="t", subject="s", previews=False)
        write(database, 1)
        assert len(await take(again, 1)) == 1

    run(test)


def test_a_slow_client_is_let_go(run: Run, database: Database) -> None:
    async def test(follower: Follower) -> None:
        slow = await follower.subscribe(tenant="t", subject=None, previews=False)
        quick = await follower.subscribe(tenant="t", subject="s", previews=False)
        for _ in range(3):
            write(database, 500)
            await take(quick, 500)
        assert len(follower) == 1
        assert slow.pending.qsize() == 1001
        heard = [slow.pending.get_nowait() for _ in range(1001)]
        assert heard[-1] is None
        assert [update.data["n"] for update in heard[:1000] if update is not None] == [*range(500)] * 2

    run(test)


def test_places_in_the_queue(run: Run, repository: JobRepository, add_job: AddJob) -> None:
    async def test(follower: Follower) -> None:
        first, second = add_job(), add_job(tenant="u")
        stream = await follower.subscribe(tenant="u", subject=second, previews=False)
        everything = await follower.subscribe(tenant="u", subject=None, previews=False)
        for listener in (stream, everything):
            (update,) = await take(listener, 1)
            assert (update.seq, update.kind, update.data["queue_position"]) == (None, "video.queued", 2)
        repository.claim(first, worker="w")
        for listener in (stream, everything):
            (update,) = await take(listener, 1)
            assert (update.subject, update.data["queue_position"]) == (second, 1)
            assert listener.pending.empty()

    run(test)


def test_places_follow_the_order_of_claims(repository: JobRepository, add_job: AddJob) -> None:
    plain, urgent, other, gone = add_job(), add_job(priority=5), add_job(tenant="u"), add_job()
    repository.request_cancel(gone)
    places = {job.id: place for job, place in repository.queue_places([], ["default", "u"], limit=99)}
    claimed = []
    while claims := repository.claim_next(worker="w", most=lambda job: 1):
        claimed.append(claims[0].job.id)
    assert sorted(places, key=lambda job_id: places[job_id]) == claimed
    assert set(claimed) == {plain, urgent, other}
    assert places[urgent] < places[plain]


def test_previews_are_asked_for_while_somebody_looks(run: Run, repository: JobRepository, add_job: AddJob) -> None:
    async def test(follower: Follower) -> None:
        seen, unseen = add_job(), add_job()
        await follower.subscribe(tenant="default", subject=unseen, previews=False)
        await follower.subscribe(tenant="default", subject=seen, previews=True)
        assert repository.previews_wanted([seen])
        assert not repository.previews_wanted([unseen])

    run(test)


def test_closing_ends_all(run: Run) -> None:
    async def test(follower: Follower) -> None:
        stream = await follower.subscribe(tenant="t", subject=None, previews=False)
        follower.close()
        assert stream.pending.get_nowait() is None
        late = await follower.subscribe(tenant="t", subject=None, previews=False)
        assert late.pending.get_nowait() is None

    run(test)


def test_stopping_waits_for_the_look_under_way(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    look = EventLog.after

    def look_slowly(*arguments: Any, **options: Any) -> Any:
        looks.append("begun")
        time.sleep(0.2)
        found = look(*arguments, **options)
        looks.append("ended")
        return found

    async def test(follower: Follower) -> None:
        monkeypatch.setattr(EventLog, "after", look_slowly)
        await follower.subscribe(tenant="t", subject=None, previews=False)
        async with asyncio.timeout(5):
            while not looks:
                await asyncio.sleep(0.01)

    run(test)
    assert looks == ["begun", "ended"]


def test_an_outage_is_waited_out(run: Run, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import OperationalError

    async def test(follower: Follower) -> None:
        stream = await follower.subscribe(tenant="t", subject="s", previews=False)
        look = EventLog.after
        failures = [1, 1, 1]

        def fail(*arguments: Any, **options: Any) -> Any:
            if failures:
                failures.pop()
                raise OperationalError("select", {}, Exception("locked"))
            return look(*arguments, **options)

        monkeypatch.setattr(EventLog, "after", fail)
        write(database, 2)
        assert len(await take(stream, 2)) == 2
        assert failures == []

    run(test)
