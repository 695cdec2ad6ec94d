"""The keeper of a claim: renewals, and every reason to stop the sampler."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from medsora.errors import GenerationCanceled
from server.jobs.repository import Claim, JobRepository
from server.worker.progress import ClaimKeeper, ClaimLost, JobCanceled, WorkerStopping

AddJob = Callable[..., str]


@pytest.fixture
def claim(repository: JobRepository, add_job: AddJob) -> Claim:
    claimed = repository.claim(add_job(), worker="w")
    assert claimed is not None
    return claimed


def keep(repository: JobRepository, claim: Claim, **changes: Any) -> ClaimKeeper:
    options: dict[str, Any] = {
        "lease_s": 60.0, "heartbeat_s": 30.0, "progress_interval_s": 0.0, "stopping": threading.Event(),
    }  # fmt: skip
    return ClaimKeeper(repository, claim, **{**options, **changes})


def steps_done(repository: JobRepository, claim: Claim) -> int:
    job = repository.get(claim.job.id)
    assert job is not None
    return job.steps_done


def test_every_step_is_written(repository: JobRepository, claim: Claim) -> None:
    with keep(repository, claim) as keeper:
        for step in range(1, 5):
            keeper.on_step(step, 4)
            assert steps_done(repository, claim) == step


def test_quick_steps_are_not_all_written_but_the_first_is(repository: JobRepository, claim: Claim) -> None:
    with keep(repository, claim, progress_interval_s=60.0) as keeper:
        for step in range(1, 5):
            keeper.on_step(step, 4)
    assert steps_done(repository, claim) == 1


def test_cancellation_stops_at_the_next_step(repository: JobRepository, claim: Claim) -> None:
    with keep(repository, claim) as keeper:
        keeper.on_step(1, 4)
        repository.request_cancel(claim.job.id)
        with pytest.raises(JobCanceled):
            keeper.on_step(2, 4)


def test_lost_claim_stops_at_the_next_step(
    repository: JobRepository, claim: Claim, expire_lease: Callable[[str], None]
) -> None:
    with keep(repository, claim) as keeper:
        keeper.on_step(1, 4)
        expire_lease(claim.job.id)
        repository.sweep_expired()
        with pytest.raises(ClaimLost):
            keeper.on_step(2, 4)


def test_stopping_worker_stops_at_the_next_step(repository: JobRepository, claim: Claim) -> None:
    stopping = threading.Event()
    with keep(repository, claim, stopping=stopping) as keeper:
        keeper.on_step(1, 4)
        stopping.set()
        with pytest.raises(WorkerStopping):
            keeper.on_step(2, 4)


def test_cancellation_comes_before_handing_back(repository: JobRepository, claim: Claim) -> None:
    stopping = threading.Event()
    stopping.set()
    repository.request_cancel(claim.job.id)
    with keep(repository, claim, stopping=stopping) as keeper, pytest.raises(JobCanceled):
        keeper.check()


def test_all_reasons_are_known_to_the_sampler() -> None:
    assert all(issubclass(reason, GenerationCanceled) for reason in (JobCanceled, ClaimLost, WorkerStopping))


def test_thread_keeps_the_lease_during_a_long_step(repository: JobRepository, claim: Claim) -> None:
    with keep(repository, claim, heartbeat_s=0.02):
        before = repository.get(claim.job.id)
        time.sleep(0.2)
        after = repository.get(claim.job.id)
    assert before is not None
    assert after is not None
    assert before.lease_until is not None
    assert after.lease_until is not None
    assert after.lease_until > before.lease_until


def test_outage_of_the_database_is_borne_for_one_lease(
    repository: JobRepository, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: object, **__: object) -> None:
        raise OperationalError("update", {}, Exception("database is locked"))

    monkeypatch.setattr(repository, "renew", locked)
    with keep(repository, claim, lease_s=0.2) as keeper:
        keeper.on_step(1, 4)
        keeper.on_step(2, 4)
        time.sleep(0.25)
        with pytest.raises(ClaimLost):
            keeper.on_step(3, 4)
