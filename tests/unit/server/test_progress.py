"""The keeper of claims: renewals, and every reason not to go on with a job."""

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from waiting import wait_until

from medsora.errors import GenerationCanceled
from server.jobs.repository import Claim, JobRepository
from server.worker.progress import ClaimKeeper, ClaimLost, JobCanceled, WorkerStopping

AddJob = Callable[..., str]


@pytest.fixture
def claims(repository: JobRepository, add_job: AddJob) -> list[Claim]:
    add_job()
    add_job()
    return repository.claim_next(worker="w", most=lambda job: 2)


def keep(repository: JobRepository, claims: list[Claim], **changes: Any) -> ClaimKeeper:
    options: dict[str, Any] = {
        "lease_s": 60.0, "heartbeat_s": 30.0, "progress_interval_s": 0.0, "giving_up": threading.Event(),
    }  # fmt: skip
    keeper = ClaimKeeper(repository, **{**options, **changes})
    keeper.keep(claims)
    return keeper


def steps_done(repository: JobRepository, claims: list[Claim]) -> list[int]:
    jobs = [repository.get(claim.job.id) for claim in claims]
    return [job.steps_done for job in jobs if job is not None]


def slow_renewals(repository: JobRepository, monkeypatch: pytest.MonkeyPatch, write_s: float) -> list[float]:
    """Let each renewal take so long; returns when they began, which grows."""
    began: list[float] = []
    renew_all = repository.renew_all

    def slow(progress: Any, **options: Any) -> dict[str, bool]:
        began.append(time.monotonic())
        time.sleep(write_s)
        return renew_all(progress, **options)

    monkeypatch.setattr(repository, "renew_all", slow)
    return began


def test_progress_of_all_is_written_soon(repository: JobRepository, claims: list[Claim]) -> None:
    with keep(repository, claims) as keeper:
        for step in range(1, 5):
            keeper.on_step(claims, step)
            wait_until(
                lambda step=step: steps_done(repository, claims) == [step, step],  # type: ignore[misc]
                timeout_s=10, what=f"step {step} of both", every_s=0.005,
            )  # fmt: skip


def test_quick_steps_are_not_all_written(
    repository: JobRepository, claims: list[Claim], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    renew_all = repository.renew_all

    def counted(progress: Any, **options: Any) -> dict[str, bool]:
        written.append(set(progress.values()))
        return renew_all(progress, **options)

    monkeypatch.setattr(repository, "renew_all", counted)
    with keep(repository, claims, progress_interval_s=0.2) as keeper:
        for step in range(1, 51):
            keeper.on_step(claims, step)
            time.sleep(0.01)
        wait_until(lambda: steps_done(repository, claims) == [50, 50], timeout_s=10, what="the last step of both")
    assert 2 <= len(written) <= 6


@pytest.mark.parametrize(
    ("write_s", "most"),
    [
        pytest.param(0.02, 7, id="a tenth of the time at most goes into them"),
        pytest.param(0.3, 3, id="but a second later the next comes"),
    ],
)
def test_the_longer_a_write_takes_the_longer_is_the_rest(
    repository: JobRepository, claims: list[Claim], monkeypatch: pytest.MonkeyPatch, write_s: float, most: int
) -> None:
    began = slow_renewals(repository, monkeypatch, write_s)
    with keep(repository, claims) as keeper:
        until = time.monotonic() + 1.1
        while time.monotonic() < until:
            keeper.on_step(claims, 1)
            time.sleep(0.005)
        wait_until(lambda: len(began) > 1, timeout_s=10, what="a second renewal")
    rests = [later - earlier for earlier, later in itertools.pairwise(began)]
    assert all(min(1.0, 10 * write_s) - 0.05 <= rest for rest in rests)  # what takes a thread a moment is no rest
    assert 2 <= len(began) <= most


def test_parts_of_a_batch_have_their_own_progress(repository: JobRepository, claims: list[Claim]) -> None:
    with keep(repository, claims) as keeper:
        keeper.on_step(claims[:1], 3)
        keeper.renew()
        assert steps_done(repository, claims) == [3, 0]


def test_cancellation_of_one_does_not_stop_the_others(repository: JobRepository, claims: list[Claim]) -> None:
    with keep(repository, claims) as keeper:
        repository.request_cancel(claims[0].job.id)
        keeper.renew()
        assert isinstance(keeper.end_of(claims[0]), JobCanceled)
        assert keeper.end_of(claims[1]) is None
        keeper.on_step(claims, 2)
        repository.request_cancel(claims[1].job.id)
        keeper.renew()
        with pytest.raises(JobCanceled):
            keeper.on_step(claims, 3)


def test_lost_claims_stop_at_the_next_step(
    repository: JobRepository, claims: list[Claim], expire_lease: Callable[[str], None]
) -> None:
    with keep(repository, claims) as keeper:
        for claim in claims:
            expire_lease(claim.job.id)
        repository.sweep_expired()
        keeper.renew()
        with pytest.raises(ClaimLost):
            keeper.on_step(claims, 2)


def test_stopping_worker_stops_at_the_next_step(repository: JobRepository, claims: list[Claim]) -> None:
    stopping = threading.Event()
    with keep(repository, claims, giving_up=stopping) as keeper:
        keeper.on_step(claims, 1)
        stopping.set()
        with pytest.raises(WorkerStopping):
            keeper.on_step(claims, 2)


def test_all_reasons_are_known_to_the_sampler() -> None:
    assert all(issubclass(reason, GenerationCanceled) for reason in (JobCanceled, ClaimLost, WorkerStopping))


def test_thread_keeps_the_leases_during_a_long_step(
    repository: JobRepository, claims: list[Claim], expire_lease: Callable[[str], None]
) -> None:
    with keep(repository, claims, heartbeat_s=0.02):
        for claim in claims:
            expire_lease(claim.job.id)
        time.sleep(0.3)
        assert repository.sweep_expired().requeued == 0


def test_settled_jobs_are_renewed_no_more(
    repository: JobRepository, claims: list[Claim], expire_lease: Callable[[str], None]
) -> None:
    with keep(repository, claims, heartbeat_s=0.02) as keeper:
        keeper.let_go(claims[:1])
        time.sleep(0.1)
        expire_lease(claims[0].job.id)
        time.sleep(0.1)
        assert repository.sweep_expired().requeued == 1


def test_outage_of_the_database_is_borne_for_one_lease(
    repository: JobRepository, claims: list[Claim], monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: object, **__: object) -> None:
        raise OperationalError("update", {}, Exception("database is locked"))

    monkeypatch.setattr(repository, "renew_all", locked)
    with keep(repository, claims, lease_s=0.2) as keeper:
        keeper.renew()
        keeper.on_step(claims, 2)
        time.sleep(0.25)
        keeper.renew()
        with pytest.raises(ClaimLost):
            keeper.on_step(claims, 3)


def test_a_newer_claim_on_the_same_job_is_another_one(
    repository: JobRepository, claims: list[Claim], add_job: AddJob
) -> None:
    """This worker hands a job back, claims it again, and only then is done with the first claim."""
    with keep(repository, claims) as keeper:
        first = claims[0]
        repository.hand_back_all([(first.job.id, first.token)])
        (second,) = repository.claim_next(worker="w", most=lambda job: 1)
        assert (second.job.id, second.token) == (first.job.id, first.token + 1)
        keeper.keep([second])
        keeper.let_go([first])
        assert isinstance(keeper.end_of(first), ClaimLost)
        keeper.on_step([second], 3)
        keeper.renew()
        assert keeper.end_of(second) is None
        job = repository.get(second.job.id)
        assert job is not None
        assert job.steps_done == 3


def test_progress_is_renewed_at_every_heartbeat_at_least(
    repository: JobRepository, claims: list[Claim], monkeypatch: pytest.MonkeyPatch
) -> None:
    began = slow_renewals(repository, monkeypatch, 0.15)
    with keep(repository, claims, heartbeat_s=0.2) as keeper:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            keeper.on_step(claims, 1)
            time.sleep(0.005)
    assert len(began) >= 4
