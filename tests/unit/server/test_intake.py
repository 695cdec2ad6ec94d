"""Orders that are taken in one transaction: each as if it came alone."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select

from server import logs
from server.errors import InProgressError
from server.events.jobs import QUEUED
from server.events.log import EventLog
from server.idempotency import Begun, IdempotentRequest, IdempotentRequests, working_on
from server.jobs.database import Database
from server.jobs.intake import Order, QueueFullError, QuotaReachedError, take_orders
from server.jobs.model import Job
from server.jobs.repository import JobRepository
from server.keys.limits import NO_LIMITS, Limits, TenantLimits
from server.sealing import Sealer


@pytest.fixture
def take(database: Database, job_values: dict[str, Any]) -> Callable[..., list[Any]]:
    """Orders with these changes, taken together: of each its tenant and seed, or the type of its refusal."""

    def take(*changes: dict[str, Any], limits: Limits = NO_LIMITS, max_queued: int = 100) -> list[Any]:
        orders = [Order({**job_values, **changed}, max_queued) for changed in changes]
        with database.write() as connection:
            outcomes = take_orders(connection, orders, limits)
        return [
            type(outcome) if isinstance(outcome, Exception) else (outcome.tenant, outcome.seed) for outcome in outcomes
        ]

    return take


def test_all_are_taken_in_the_order_of_their_coming(
    take: Callable[..., list[Any]], database: Database, repository: JobRepository
) -> None:
    asked = [{"tenant": tenant, "seed": seed} for seed, tenant in enumerate(["b", "a", "b", "c", "a"])]
    assert take(*asked) == [(one["tenant"], one["seed"]) for one in asked]
    with database.read() as connection:
        assert list(connection.scalars(select(Job.seed).order_by(Job.seq))) == [0, 1, 2, 3, 4]
    usage = TenantLimits(database, NO_LIMITS).usage
    assert [usage(tenant).clips for tenant in "abc"] == [2, 2, 1]
    assert repository.count_waiting() == 5
    events = EventLog(database).after(0, limit=100)
    assert [(event.kind, event.tenant) for event in events] == [(QUEUED, one["tenant"]) for one in asked]


def test_what_one_order_says_more_than_the_first_is_not_lost(
    take: Callable[..., list[Any]], repository: JobRepository
) -> None:
    """Of rows that are inserted together, the first says which columns are written."""
    more = {"remixed_from": "video_1", "priority": 3, "strength": 0.5, "prefix_frames": 4, "webhook_url": "https://a.b"}
    take({}, more, {"deterministic": True})
    page = repository.page(limit=10, after=None, newest_first=False)
    assert page is not None
    plain, full, exact = page[0]
    assert {name: getattr(full, name) for name in more} == more
    others = {"remixed_from": None, "priority": 0, "strength": 1.0, "prefix_frames": 0, "webhook_url": None}
    for job in (plain, exact):
        assert {name: getattr(job, name) for name in more} == others
    assert [job.deterministic for job in (plain, full, exact)] == [False, False, True]


def test_who_is_beyond_a_limit_does_not_keep_off_others(take: Callable[..., list[Any]], database: Database) -> None:
    a_clip = 16 * 32 * 32 / 1e6
    of_a, of_b, small = {"tenant": "a"}, {"tenant": "b"}, {"tenant": "a", "num_frames": 8}
    limits = Limits(megapixel_frames_per_day=2.5 * a_clip)
    refused = QuotaReachedError
    assert take(of_a, of_b, of_a, of_a, small, of_a, of_b, limits=limits) == [
        ("a", 7), ("b", 7), ("a", 7), refused, ("a", 7), refused, ("b", 7),
    ]  # fmt: skip
    assert TenantLimits(database, limits).usage("a").megapixel_frames == pytest.approx(2.5 * a_clip)
    assert take(of_a, of_b, limits=limits) == [refused, refused]


def test_no_more_wait_than_may(take: Callable[..., list[Any]], repository: JobRepository) -> None:
    asked = [{"seed": seed} for seed in range(3)]
    assert take(*asked, max_queued=2) == [("default", 0), ("default", 1), QueueFullError]
    assert take(*asked, max_queued=2) == [QueueFullError] * 3
    assert repository.count_waiting() == 2


def test_each_is_noted_for_the_request_that_asked_for_it(
    database: Database, job_values: dict[str, Any], sealer: Sealer
) -> None:
    """Whichever thread writes it down; and where another process has taken the request over, nothing is made."""
    requests = IdempotentRequests(database, sealer)
    begun = [requests.begin("default", key, "the same") for key in ("one", "two", "taken over")]
    begun[2] = Begun("default", "taken over", "another token")
    orders = []
    for seed, one in enumerate(begun):
        assert isinstance(one, Begun)
        with working_on(one):
            orders.append(Order({**job_values, "seed": seed}, 100))
    orders.append(Order({**job_values, "seed": 3}, 100))
    with database.write() as connection:
        outcomes = take_orders(connection, orders, NO_LIMITS)
        noted = connection.execute(select(IdempotentRequest.key, IdempotentRequest.object_id))
        made = {row.key: row.object_id for row in noted}
    assert made == {
        "one": outcomes[0].id, "two": outcomes[1].id, "taken over": None,
    }  # fmt: skip
    assert isinstance(outcomes[2], InProgressError)
    assert outcomes[3].seed == 3
    assert TenantLimits(database, NO_LIMITS).usage("default").clips == 3


def test_each_is_of_the_request_that_asked_for_it(database: Database, job_values: dict[str, Any]) -> None:
    orders = []
    for seed in range(3):
        with logs.bound(request_id=f"req_{seed}"):
            orders.append(Order({**job_values, "seed": seed}, 100))
    with database.write() as connection, logs.bound(request_id="of whoever writes"):
        rows = take_orders(connection, orders, NO_LIMITS)
    assert [row.request_id for row in rows] == ["req_0", "req_1", "req_2"]


def test_who_is_kept_off_by_something_else_uses_up_no_quota(database: Database, job_values: dict[str, Any]) -> None:
    with working_on(Begun("default", "taken over", "another token")):
        lost = Order(job_values, 100)
    with database.write() as connection:
        outcomes = take_orders(connection, [lost, Order(job_values, 100)], Limits(clips_per_day=1, queued_jobs=1))
    assert isinstance(outcomes[0], InProgressError)
    assert outcomes[1].status == "queued"


def test_many_threads_are_answered_each_with_its_own_job(
    repository: JobRepository, job_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    together, sizes = threading.Barrier(16), []

    def take(connection: Any, orders: Sequence[Order], limits: Limits) -> list[Any]:
        if not sizes:
            time.sleep(0.3)  # the others come meanwhile
        sizes.append(len(orders))
        return take_orders(connection, orders, limits)

    monkeypatch.setattr("server.jobs.repository.take_orders", take)

    def ask(seed: int) -> Any:
        together.wait()
        try:
            return repository.add({**job_values, "seed": seed}, max_queued=40)
        except QueueFullError:
            return None

    with ThreadPoolExecutor(16) as threads:
        jobs = list(threads.map(ask, range(48)))
    made = [job for job in jobs if job is not None]
    assert len(made) == len({job.id for job in made}) == repository.count_waiting() == 40
    assert all(job is None or job.seed == seed for seed, job in enumerate(jobs))
    assert sum(sizes) == 48
    assert max(sizes) >= 8
