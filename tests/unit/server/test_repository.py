"""Jobs in the table: claims, fencing, leases, caps; each promise of the protocol."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update

from server.jobs.database import Database, database_now
from server.jobs.intake import QueueFullError
from server.jobs.model import DeletedJob, Job, JobStatus, new_job_id
from server.jobs.repository import FinishedWork, JobRecord, JobRepository, Removal

AddJob = Callable[..., str]
Expire = Callable[[str], None]
Work = Callable[[str, int], FinishedWork]


def fetch(repository: JobRepository, job_id: str) -> JobRecord:
    job = repository.get(job_id)
    assert job is not None
    return job


def test_new_job_waits_with_the_time_of_the_database(repository: JobRepository, add_job: AddJob) -> None:
    job = fetch(repository, add_job())
    assert job.status is JobStatus.QUEUED
    assert job.attempt == 0
    assert job.published_at is None
    assert job.queued_at == pytest.approx(job.created_at, abs=1.0)


def test_claim_counts_before_the_work(repository: JobRepository, add_job: AddJob) -> None:
    job_id = add_job()
    claim = repository.claim(job_id, worker="w1")
    assert claim is not None
    assert (claim.token, claim.job.status, claim.job.worker) == (1, JobStatus.RUNNING, "w1")
    assert claim.job.lease_until is not None
    assert claim.job.started_at is not None
    assert claim.job.lease_until == pytest.approx(claim.job.started_at + 60.0, abs=0.1)


def test_second_claim_gets_nothing_while_the_lease_holds(repository: JobRepository, add_job: AddJob) -> None:
    job_id = add_job()
    assert repository.claim(job_id, worker="w1") is not None
    assert repository.claim(job_id, worker="w2") is None


def test_expired_claim_is_taken_over_and_the_old_worker_is_fenced_out(
    repository: JobRepository, add_job: AddJob, expire_lease: Expire, finished_work: Work
) -> None:
    job_id = add_job()
    assert repository.claim(job_id, worker="w1") is not None
    expire_lease(job_id)
    second = repository.claim(job_id, worker="w2")
    assert second is not None
    assert second.token == 2
    assert repository.renew(job_id, 1, steps_done=3) is None
    assert not repository.succeed(job_id, 1, finished_work(job_id, 1))
    assert not repository.fail(job_id, 1, code="x", message="x")
    assert not repository.hand_back(job_id, 1)
    assert not repository.finish_cancel(job_id, 1)
    assert repository.succeed(job_id, 2, finished_work(job_id, 2))
    job = fetch(repository, job_id)
    assert (job.status, job.artifact) == (JobStatus.SUCCEEDED, finished_work(job_id, 2).artifact)


@pytest.mark.parametrize("ahead_s", [-7200.0, 7200.0])
def test_the_clock_of_a_worker_decides_nothing(
    repository: JobRepository, add_job: AddJob, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    job_id = add_job()
    claim = repository.claim(job_id, worker="right")
    assert claim is not None
    with monkeypatch.context() as patch:
        now = time.time
        patch.setattr(time, "time", lambda: now() + ahead_s)
        assert repository.claim(job_id, worker="wrong") is None, "taken too early"
        assert repository.sweep_expired().jobs == []
        later = repository.claim(add_job(), worker="wrong")
        assert later is not None
    assert repository.sweep_expired().jobs == [], "a lease that had run out when it was given"
    assert repository.renew(later.job.id, later.token, steps_done=1) is False
    lease_until = fetch(repository, later.job.id).lease_until
    assert lease_until is not None
    assert lease_until == pytest.approx(time.time() + 60.0, abs=5.0)


def test_renewal_moves_the_lease_and_tells_of_cancellation(repository: JobRepository, add_job: AddJob) -> None:
    job_id = add_job()
    claim = repository.claim(job_id, worker="w")
    assert claim is not None
    assert repository.renew(job_id, claim.token, steps_done=2) is False
    assert fetch(repository, job_id).steps_done == 2
    assert repository.request_cancel(job_id)
    assert repository.renew(job_id, claim.token, steps_done=3) is True


def test_cancel_wins_against_a_result(repository: JobRepository, add_job: AddJob, finished_work: Work) -> None:
    job_id = add_job()
    claim = repository.claim(job_id, worker="w")
    assert claim is not None
    repository.request_cancel(job_id)
    assert not repository.succeed(job_id, claim.token, finished_work(job_id, 1))
    assert not repository.hand_back(job_id, claim.token)
    assert repository.finish_cancel(job_id, claim.token)
    job = fetch(repository, job_id)
    assert (job.status, job.error_code) == (JobStatus.CANCELED, "cancelled")


def test_waiting_job_is_canceled_at_once_and_cannot_be_claimed(repository: JobRepository, add_job: AddJob) -> None:
    job_id = add_job()
    assert repository.request_cancel(job_id)
    assert fetch(repository, job_id).status is JobStatus.CANCELED
    assert repository.claim(job_id, worker="w") is None


def test_finished_job_stays_finished(repository: JobRepository, add_job: AddJob, finished_work: Work) -> None:
    job_id = add_job()
    assert repository.claim(job_id, worker="w") is not None
    assert repository.succeed(job_id, 1, finished_work(job_id, 1))
    before = fetch(repository, job_id)
    assert not repository.request_cancel(job_id)
    assert not repository.fail(job_id, 1, code="x", message="x")
    assert not repository.succeed(job_id, 1, finished_work(job_id, 1))
    assert repository.renew(job_id, 1, steps_done=0) is None
    assert repository.claim(job_id, worker="w") is None
    repository.sweep_expired()
    assert fetch(repository, job_id) == before


def test_hand_back_lets_another_worker_begin_at_once_and_costs_no_attempt(
    repository: JobRepository, add_job: AddJob
) -> None:
    job_id = add_job()
    for number in range(1, 8):
        claim = repository.claim(job_id, worker="w")
        assert claim is not None, f"claim {number}"
        assert claim.token == number
        assert repository.hand_back(job_id, claim.token)
        assert repository.unpublished(grace_s=60.0, limit=10) == [(job_id, number)]


def test_poison_job_runs_three_times(repository: JobRepository, add_job: AddJob, expire_lease: Expire) -> None:
    job_id = add_job()
    for _ in range(3):
        assert repository.claim(job_id, worker="w") is not None
        expire_lease(job_id)
        result = repository.sweep_expired()
    assert (result.requeued, result.exhausted) == (0, 1)
    job = fetch(repository, job_id)
    assert (job.status, job.error_code, job.attempt) == (JobStatus.FAILED, "attempts_exhausted", 3)
    assert job.error_message == "The worker was lost or gave up 3 times while running this job."


def test_hand_back_of_the_last_attempt_ends_the_job(
    repository: JobRepository, add_job: AddJob, expire_lease: Expire
) -> None:
    """Nobody could claim it any more, and it would wait for ever."""
    tried, fresh = add_job(), add_job()
    for _ in range(2):
        assert repository.claim(tried, worker="w") is not None
        expire_lease(tried)
        repository.sweep_expired()
    keys = []
    for job_id in (tried, fresh):
        claim = repository.claim(job_id, worker="w")
        assert claim is not None
        keys.append((job_id, claim.token))
    became = repository.hand_back_all(keys, uses_attempt=True)
    assert became == {tried: JobStatus.FAILED, fresh: JobStatus.QUEUED}
    assert fetch(repository, tried).error_code == "attempts_exhausted"
    again = repository.claim(fresh, worker="w")
    assert again is not None
    assert repository.hand_back_all([(fresh, again.token)]) == {fresh: JobStatus.QUEUED}, "this costs none"


def test_take_over_of_an_expired_lease_respects_the_cap(
    repository: JobRepository, add_job: AddJob, expire_lease: Expire
) -> None:
    job_id = add_job()
    for _ in range(3):
        assert repository.claim(job_id, worker="w") is not None
        expire_lease(job_id)
    assert repository.claim(job_id, worker="w") is None


def test_sweep_returns_a_lost_job_to_the_queue(
    repository: JobRepository, add_job: AddJob, expire_lease: Expire
) -> None:
    job_id = add_job()
    repository.mark_published([job_id])
    assert repository.claim(job_id, worker="w") is not None
    assert repository.sweep_expired().requeued == 0
    expire_lease(job_id)
    assert repository.sweep_expired().requeued == 1
    job = fetch(repository, job_id)
    assert (job.status, job.published_at, job.worker, job.attempt) == (JobStatus.QUEUED, None, None, 1)


def test_sweep_honours_a_cancellation_that_the_worker_did_not_live_to_see(
    repository: JobRepository, add_job: AddJob, expire_lease: Expire
) -> None:
    job_id = add_job()
    assert repository.claim(job_id, worker="w") is not None
    repository.request_cancel(job_id)
    expire_lease(job_id)
    assert repository.sweep_expired().canceled == 1
    assert fetch(repository, job_id).status is JobStatus.CANCELED


def test_queue_has_a_cap(repository: JobRepository, job_values: dict[str, Any]) -> None:
    ids = [repository.add(job_values, max_queued=2).id for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 jobs are waiting"):
        repository.add(job_values, max_queued=2)
    assert repository.claim(ids[0], worker="w") is not None
    repository.add(job_values, max_queued=2)


def test_fresh_job_is_left_to_its_api_and_an_old_one_is_published(
    repository: JobRepository, add_job: AddJob, database: Database
) -> None:
    job_id = add_job()
    assert repository.unpublished(grace_s=5.0, limit=10) == []
    with database.write() as connection:
        connection.execute(update(Job).values(queued_at=database_now() - 6.0))
    assert repository.unpublished(grace_s=5.0, limit=10) == [(job_id, 0)]
    repository.mark_published([job_id])
    assert repository.unpublished(grace_s=5.0, limit=10) == []
    assert repository.stale_published(after_s=5.0, limit=10) == []
    with database.write() as connection:
        connection.execute(update(Job).values(published_at=database_now() - 6.0))
    assert repository.stale_published(after_s=5.0, limit=10) == [(job_id, 0)]
    repository.forget_published()
    assert repository.unpublished(grace_s=5.0, limit=10) == [(job_id, 0)]


def test_pages_meet_without_gap_or_overlap(repository: JobRepository, add_job: AddJob) -> None:
    ids = [add_job() for _ in range(5)]
    seen: list[str] = []
    after, has_more = None, True
    while has_more:
        page = repository.page(limit=2, after=after, newest_first=True)
        assert page is not None
        jobs, has_more = page
        seen += [job.id for job in jobs]
        after = seen[-1]
    assert seen == ids[::-1]
    page = repository.page(limit=2, after=ids[0], newest_first=False)
    assert page is not None
    assert [job.id for job in page[0]] == ids[1:3]
    assert repository.page(limit=2, after=new_job_id(), newest_first=True) is None


def test_deleted_job_still_marks_its_place_in_the_list(
    repository: JobRepository, add_job: AddJob, database: Database
) -> None:
    ids = [add_job() for _ in range(4)]
    for job_id in ids[2:]:
        repository.request_removal(job_id)
    assert repository.forget([ids[3]]) == 1
    for cursor in ids[:1:-1]:  # one that is gone, and one that is only hidden
        page = repository.page(limit=10, after=cursor, newest_first=True)
        assert page is not None
        assert [job.id for job in page[0]] == [ids[1], ids[0]]
    with database.write() as connection:
        connection.execute(update(DeletedJob).values(deleted_at=database_now() - 90_000.0))
    assert repository.forget([ids[2]]) == 1
    assert repository.page(limit=10, after=ids[3], newest_first=True) is None, "places are kept for ever"
    assert repository.page(limit=10, after=ids[2], newest_first=True) is not None


def test_removal_hides_at_once_and_waits_for_the_worker(
    repository: JobRepository, add_job: AddJob, finished_work: Work
) -> None:
    job_id = add_job()
    assert repository.claim(job_id, worker="w") is not None
    assert repository.request_removal(job_id) is Removal.RUNNING
    assert repository.get(job_id) is None
    assert repository.request_removal(job_id) is Removal.MISSING
    assert repository.removable(limit=10) == []
    assert repository.forget([job_id]) == 0
    assert repository.renew(job_id, 1, steps_done=1) is True
    assert not repository.succeed(job_id, 1, finished_work(job_id, 1))
    assert repository.finish_cancel(job_id, 1)
    assert [job.id for job in repository.removable(limit=10)] == [job_id]
    assert repository.forget([job_id]) == 1
    assert repository.removable(limit=10) == []


def test_removal_of_a_waiting_job_cancels_it(repository: JobRepository, add_job: AddJob) -> None:
    job_id = add_job()
    assert repository.request_removal(job_id) is Removal.READY
    assert repository.claim(job_id, worker="w") is None
    assert repository.forget([job_id]) == 1


def test_live_jobs_are_counted_by_model_and_state(repository: JobRepository, add_job: AddJob) -> None:
    running, canceled = add_job(), add_job()
    add_job(model="other")
    add_job(model="other")
    repository.claim(running, worker="w")
    repository.request_cancel(canceled)
    assert repository.count_live() == {("tiny", JobStatus.RUNNING): 1, ("other", JobStatus.QUEUED): 2}


def test_outlook_follows_the_pace_of_finished_jobs(
    repository: JobRepository, add_job: AddJob, finished_work: Work
) -> None:
    done = add_job()
    first = fetch(repository, done)
    assert repository.outlook(first).left_s is None
    repository.claim(done, worker="w")
    repository.succeed(done, 1, finished_work(done, 1))  # 1 s for 4 steps
    ahead, last = add_job(), add_job()
    assert repository.outlook(fetch(repository, ahead)).left_s == pytest.approx(1.0)
    assert repository.outlook(fetch(repository, last)).left_s == pytest.approx(2.0)
    repository.claim(ahead, worker="w")
    repository.renew(ahead, 1, steps_done=3)
    assert repository.outlook(fetch(repository, ahead)).left_s == pytest.approx(0.25)
    assert repository.outlook(fetch(repository, last)).left_s == pytest.approx(1.25)
    other = add_job(num_inference_steps=40)
    repository.claim(other, worker="v")
    assert repository.outlook(fetch(repository, last)).left_s == pytest.approx(1.0 + (0.25 + 10.0) / 2)


def test_a_tenant_sees_and_changes_its_own_jobs_alone(repository: JobRepository, add_job: AddJob) -> None:
    mine, theirs = add_job(tenant="a"), add_job(tenant="b")
    assert repository.get(theirs, tenant="a") is None
    assert not repository.request_cancel(theirs, tenant="a")
    assert repository.request_removal(theirs, tenant="a") is Removal.MISSING
    assert repository.page(limit=10, after=theirs, newest_first=True, tenant="a") is None
    page = repository.page(limit=10, after=None, newest_first=True, tenant="a")
    assert page is not None
    assert [job.id for job in page[0]] == [mine]
    everyone = repository.page(limit=10, after=None, newest_first=True)
    assert everyone is not None
    assert [(job.id, job.tenant, job.status) for job in everyone[0]] == [
        (theirs, "b", JobStatus.QUEUED),
        (mine, "a", JobStatus.QUEUED),
    ]
    assert repository.request_removal(theirs, tenant="b") is Removal.READY
    assert repository.forget([theirs]) == 1
    assert repository.page(limit=10, after=theirs, newest_first=True, tenant="a") is None
    assert repository.page(limit=10, after=theirs, newest_first=True, tenant="b") == ([], False)


def test_what_clients_and_workers_rely_on_waits_for_the_disk(
    repository: JobRepository, add_job: AddJob, finished_work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewed leases, hints and figures alone do not: a crash of the database may undo them."""
    waited: list[bool] = []
    original = Database.write

    def write(database: Database, *, is_durable: bool = True) -> Any:
        waited.append(is_durable)
        return original(database, is_durable=is_durable)

    monkeypatch.setattr(Database, "write", write)

    def waits(action: Callable[[], object]) -> bool:
        waited.clear()
        assert action() is not False
        assert waited, "nothing was written"
        return all(waited)

    def claimed() -> str:
        job_id = add_job()
        assert repository.claim(job_id, worker="w") is not None
        return job_id

    job_id = add_job()
    assert waits(add_job)
    assert waits(lambda: repository.claim(job_id, worker="w"))
    assert waits(lambda: repository.succeed(job_id, 1, finished_work(job_id, 1)))
    failed, canceled, handed = claimed(), claimed(), claimed()
    assert waits(lambda: repository.fail(failed, 1, code="x", message="x"))
    assert waits(lambda: repository.finish_cancel(canceled, 1))
    assert waits(lambda: repository.hand_back(handed, 1))
    unwanted = claimed()
    assert waits(lambda: repository.request_cancel(unwanted))
    assert waits(lambda: repository.request_removal(unwanted))
    assert waits(repository.sweep_expired)
    job_id = claimed()
    # what is told has a place in the log, which must never come to mean another event
    assert waits(lambda: repository.renew_all({(job_id, 1): 1}, announce=True))
    assert waits(lambda: repository.show_preview(job_id, 1, b"", steps_done=1))
    assert not waits(lambda: repository.renew_all({(job_id, 1): 1}))
    assert not waits(lambda: repository.mark_published([job_id]))
    assert not waits(lambda: repository.want_previews([job_id], [], for_s=1.0))
    assert not waits(lambda: repository.count_batch("tiny", 1))
