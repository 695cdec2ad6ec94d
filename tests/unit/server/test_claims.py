"""Claims at the same time: nothing is taken twice, the order and the shares hold, nobody waits, and nothing is slow."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, event, select, text, update
from sqlalchemy.exc import OperationalError

from server.events.model import Event
from server.jobs.database import Database, database_now
from server.jobs.model import Job
from server.jobs.repository import Claim, FinishedWork, JobRepository


def in_threads(works: list[Callable[[], None]]) -> None:
    """Do all of this at once; the first error of any is raised."""
    errors: list[BaseException] = []
    begin = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            begin.wait(30)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_many_claimers_take_each_job_once_and_in_order(repository: JobRepository, database: Database) -> None:
    claimers, most, each = 3 if database.is_sqlite else 8, 3, 60  # SQLite lets one write at a time
    make_jobs(database, 3 * each, tenants=3)
    taken: list[Claim] = []

    def claim_all() -> None:
        name = threading.current_thread().name
        while True:
            try:
                claims = repository.claim_next(worker=name, most=lambda job: most)
            except OperationalError:  # its turn did not come within five seconds, on a machine that is busy
                if database.is_sqlite:
                    continue
                raise
            if not claims:
                return
            taken.extend(claims)

    in_threads([claim_all] * claimers)
    assert len({claim.job.id for claim in taken}) == len(taken) == 3 * each
    assert {claim.token for claim in taken} == {1}
    with database.read() as connection:
        assert connection.execute(select(Job.status, Job.attempt).distinct()).all() == [("running", 1)]
        # the log has them in the order in which the claims were committed
        told = select(Event.subject).where(Event.kind == "video.started").order_by(Event.seq)
        place_of = {job_id: place for place, job_id in enumerate(connection.scalars(told))}
    in_order = sorted((claim.job for claim in taken), key=lambda job: place_of[job.id])
    assert len({job.worker for job in in_order}) > 1, "one claimer took all"
    at_work = claimers * most  # what others may have chosen at the same time
    for tenant in "abc":
        own = [job for job in in_order if job.tenant == tenant]
        wanted = sorted(own, key=lambda job: (-job.priority, job.seq))
        moved = max(abs(place - wanted.index(job)) for place, job in enumerate(own))
        assert moved < (1 if database.is_sqlite else at_work), f"a job of {tenant} was taken {moved} places off its own"
    shares: Counter[str] = Counter(dict.fromkeys("abc", 0))
    for job in in_order[: 2 * each]:
        shares[job.tenant] += 1
        assert max(shares.values()) - min(shares.values()) <= 2 * at_work, shares


def test_claimer_passes_over_what_another_is_at(postgres_url: str, job_values: dict[str, Any]) -> None:
    database = Database(postgres_url)
    repository = JobRepository(database, lease_s=60.0, max_attempts=3)
    first, second, third = (repository.add({**job_values, "seed": seed}, max_queued=10).id for seed in range(3))
    with database.write() as other:
        other.execute(select(Job.id).where(Job.id == first).with_for_update())
        began = time.monotonic()
        (claim,) = repository.claim_next(worker="w", most=lambda job: 1)
        assert claim.job.id == second
        assert repository.claim(first, worker="w") is None
        assert repository.sweep_expired().jobs == []
        assert time.monotonic() - began < 5.0
        # and a batch that has lost its first choice goes on with the next
        (claim,) = repository.claim_alike(claim.job, worker="w", most=2)
        assert claim.job.id == third
    (claim,) = repository.claim_next(worker="w", most=lambda job: 1)
    assert claim.job.id == first
    database.close()


def test_whoever_changes_several_jobs_at_once_deadlocks_with_nobody(
    postgres_url: str, job_values: dict[str, Any], finished_work: Callable[[str, int], FinishedWork]
) -> None:
    database = Database(postgres_url)
    repository = JobRepository(database, lease_s=60.0, max_attempts=3)
    job_ids = [repository.add({**job_values, "seed": seed}, max_queued=100).id for seed in range(12)]
    claims = repository.claim_next(worker="w", most=lambda job: 8)
    assert len(claims) == 8
    running = [(claim.job.id, claim.token) for claim in claims]
    ended = threading.Event()
    counts: Counter[str] = Counter()

    def again_and_again(name: str, work: Callable[[random.Random], object]) -> Callable[[], None]:
        def run() -> None:
            chance = random.Random(name)
            while not ended.is_set():
                work(chance)
                counts[name] += 1

        return run

    def renew(chance: random.Random) -> None:
        # in several statements, as their numbers of steps differ
        repository.renew_all({claim: chance.randrange(3) for claim in chance.sample(running, 8)}, announce=True)

    def expire_and_sweep(chance: random.Random) -> None:
        late = update(Job).where(Job.id == chance.choice(running)[0], Job.status == "running")
        with database.write() as connection:
            connection.execute(late.values(lease_until=database_now() - 1.0))
        repository.sweep_expired()

    def finish(chance: random.Random) -> None:
        wrong = [(job_id, token + 100, finished_work(job_id, token)) for job_id, token in chance.sample(running, 8)]
        assert repository.succeed_all(wrong) == set()

    def end_after_many() -> None:
        deadline = time.monotonic() + 60
        try:
            while min((counts[name] for name in ("renew", "sweep", "finish", "watch", "mark")), default=0) < 15:
                assert time.monotonic() < deadline, counts
                time.sleep(0.01)
        finally:
            ended.set()

    in_threads([
        again_and_again("renew", renew),
        again_and_again("sweep", expire_and_sweep),
        again_and_again("finish", finish),
        again_and_again("watch", lambda chance: repository.want_previews(job_ids, ["default"], for_s=1.0)),
        again_and_again("mark", lambda chance: repository.mark_published(chance.sample(job_ids, 12))),
        end_after_many,
    ])  # fmt: skip
    database.close()


# -- a long queue ----------------------------------------------------------------------------------------------------

ROWS = 100_000


def make_jobs(database: Database, number: int, *, tenants: int, queued: float = 1.0) -> None:
    """Fill the table: ``queued`` of the jobs wait, published a while ago, and the others are made."""
    rows = (
        f"select generate_series(1, {number}) as n"
        if not database.is_sqlite
        else f"with recursive numbers(n) as (select 1 union all select n + 1 from numbers where n < {number})"
        " select n from numbers"
    )
    names = "substr('abcdefghij', 1 + n % :tenants, 1)"
    state = "case when n % 100 < :queued then 'queued' else 'succeeded' end"
    values = {
        "id": "'video_' || n", "tenant": names, "status": state, "model": "'tiny'", "prompt": "'p'", "label": "'l'",
        "seed": "n", "num_frames": "16", "width": "32", "height": "32", "fps": "8.0", "seconds": "'2'",
        "num_inference_steps": "4", "guidance_scale": "1.0", "sampler": "'euler'", "priority": "n * 7 % 3",
        "attempt": "0", "handed_back": "0", "steps_done": "0", "cancel_requested": "false", "created_at": "n",
        "queued_at": "n", "published_at": "n", "completed_at": "case when n % 100 < :queued then null else n end",
    }  # fmt: skip
    with database.write() as connection:
        connection.execute(
            text(f"insert into jobs ({', '.join(values)}) select {', '.join(values.values())} from ({rows}) as made"),
            {"tenants": tenants, "queued": 100 * queued},
        )
    with database.write() as connection:
        connection.execute(text("analyze" if database.is_sqlite else "analyze jobs"))


@contextmanager
def explained(database: Database) -> Iterator[list[tuple[str, str]]]:
    """Collect each statement that is about jobs, and how the database goes about it."""
    plans: list[tuple[str, str]] = []

    def explain(conn: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if many or " jobs" not in statement or statement.startswith(("INSERT", "EXPLAIN")):
            return
        how = "EXPLAIN QUERY PLAN " if database.is_sqlite else "EXPLAIN "
        cursor.execute(how + statement, parameters)
        plans.append((statement, "\n".join(str(row[-1]) for row in cursor.fetchall())))

    event.listen(database.engine, "before_cursor_execute", explain)
    try:
        yield plans
    finally:
        event.remove(database.engine, "before_cursor_execute", explain)


def test_nothing_that_is_done_often_reads_all_jobs(database: Database, repository: JobRepository) -> None:
    make_jobs(database, ROWS, tenants=10, queued=0.5)
    with explained(database) as plans:
        claims = repository.claim_next(worker="w", most=lambda job: 16)
        assert len(claims) == 16
        repository.claim_alike(claims[0].job, worker="w", most=16)
        repository.renew_all({(claim.job.id, claim.token): 2 for claim in claims}, announce=True)
        repository.hand_back_all([(claims[0].job.id, claims[0].token)])
        repository.sweep_expired()
        assert len(repository.unpublished(grace_s=1.0, limit=500)) == 1
        assert len(repository.stale_published(after_s=1.0, limit=8)) == 8
        repository.removable(limit=500)
        repository.expire(kept_s=None, limit=500)
        repository.count_done(within_s=60.0, limit=100)
        repository.get(claims[0].job.id)
        repository.page(limit=20, after=None, newest_first=True, tenant="a")
    assert len(plans) > 15
    whole = "SCAN jobs\n" if database.is_sqlite else "Seq Scan on jobs"
    slow = [f"{statement}\n{plan}" for statement, plan in plans if whole in plan + "\n"]
    assert not slow, "\n\n".join(slow)
