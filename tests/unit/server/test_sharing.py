"""Who is next: priorities, order of arrival, shares of tenants, and who may be sampled together."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from server.jobs.repository import Claim, JobRepository

AddJob = Callable[..., str]


def claim(repository: JobRepository, most: int = 1) -> list[Claim]:
    return repository.claim_next(worker="w", most=lambda job: most)


def claim_all(repository: JobRepository, most: int = 1) -> list[list[Claim]]:
    batches = []
    while batch := claim(repository, most):
        batches.append(batch)
    return batches


def seeds(batch: list[Claim]) -> list[int]:
    return [one.job.seed for one in batch]


def test_order_of_arrival_is_kept(repository: JobRepository, add_job: AddJob) -> None:
    for seed in range(5):
        add_job(seed=seed)
    assert [seeds(batch) for batch in claim_all(repository, 2)] == [[0, 1], [2, 3], [4]]
    assert claim(repository) == []


def test_higher_priority_overtakes(repository: JobRepository, add_job: AddJob) -> None:
    for seed, priority in enumerate((0, -5, 10, 0, 10)):
        add_job(seed=seed, priority=priority)
    assert [seeds(batch)[0] for batch in claim_all(repository)] == [2, 4, 0, 3, 1]


@pytest.mark.parametrize(
    "other", [{"model": "m"}, {"num_frames": 32}, {"width": 64}, {"height": 64}, {"num_inference_steps": 5},
              {"guidance_scale": 2.0}, {"sampler": "heun"}, {"deterministic": True}],
)  # fmt: skip
def test_only_jobs_that_are_alike_are_taken_together(
    repository: JobRepository, add_job: AddJob, other: dict[str, Any]
) -> None:
    add_job(seed=0)
    add_job(seed=1, **other)
    add_job(seed=2, label="another label", fps=8.0)
    assert [seeds(batch) for batch in claim_all(repository, 8)] == [[0, 2], [1]]


def test_more_of_the_same_kind_can_be_taken_later(repository: JobRepository, add_job: AddJob) -> None:
    add_job(seed=0)
    (first,) = claim(repository, 8)
    assert repository.claim_alike(first.job, worker="w", most=8) == []
    for seed, steps in ((1, 4), (2, 9), (3, 4), (4, 4)):
        add_job(seed=seed, num_inference_steps=steps)
    assert seeds(repository.claim_alike(first.job, worker="w", most=2)) == [1, 3]


def test_job_that_a_worker_was_lost_with_runs_alone(
    repository: JobRepository, add_job: AddJob, expire_lease: Callable[[str], None]
) -> None:
    ids = [add_job(seed=seed) for seed in range(3)]
    (batch,) = claim_all(repository, 3)
    expire_lease(ids[1])
    repository.hand_back_all([(one.job.id, one.token) for one in batch if one.job.id != ids[1]])
    repository.sweep_expired()
    add_job(seed=3)
    assert [seeds(batch) for batch in claim_all(repository, 8)] == [[0, 2, 3], [1]]


def test_lease_that_ran_out_is_taken_over(
    repository: JobRepository, add_job: AddJob, expire_lease: Callable[[str], None]
) -> None:
    job_id = add_job()
    claim(repository)
    assert claim(repository) == []
    expire_lease(job_id)
    ((taken,),) = claim_all(repository)
    assert (taken.job.id, taken.token) == (job_id, 2)


def test_flood_of_one_tenant_does_not_hold_up_another(repository: JobRepository, add_job: AddJob) -> None:
    for seed in range(40):
        add_job(seed=seed, tenant="flood")
    claim_all_of_flood = [claim(repository, 4) for _ in range(5)]
    assert sum(map(len, claim_all_of_flood)) == 20
    for seed in range(10):
        add_job(seed=seed, tenant="late")
    shares = [Counter(one.job.tenant for one in claim(repository, 4)) for _ in range(5)]
    # one batch of the flood had been begun: so far the newcomer is ahead, and no further
    assert shares[1:3] == [{"flood": 2, "late": 2}] * 2, shares
    assert sum(share["late"] for share in shares[:4]) == 10


def test_priority_takes_nothing_from_another_tenant(repository: JobRepository, add_job: AddJob) -> None:
    for seed in range(4):
        add_job(seed=seed, tenant="loud", priority=10)
        add_job(seed=seed, tenant="quiet", priority=-10)
    order = [batch[0].job.tenant for batch in claim_all(repository)]
    assert Counter(order[:4]) == {"loud": 2, "quiet": 2}


def test_share_is_of_work_and_not_of_jobs(repository: JobRepository, add_job: AddJob) -> None:
    for seed in range(30):
        add_job(seed=seed, tenant="long", num_inference_steps=40)
        add_job(seed=seed, tenant="short", num_inference_steps=10)
    order = [claim(repository)[0].job.tenant for _ in range(25)]
    assert Counter(order) == {"long": 5, "short": 20}


def test_nobody_saves_up_or_pays_for_a_time_alone(repository: JobRepository, add_job: AddJob) -> None:
    for seed in range(20):
        add_job(seed=seed, tenant="early")
    claim_all(repository)
    for seed in range(4):
        add_job(seed=seed, tenant="new")
        add_job(seed=seed, tenant="early")
    order = [batch[0].job.tenant for batch in claim_all(repository)]
    assert Counter(order[:4]) == {"new": 2, "early": 2}, order


def test_three_tenants_and_batches_of_any_size(repository: JobRepository, add_job: AddJob) -> None:
    for tenant, count in (("a", 60), ("b", 60), ("c", 60)):
        for seed in range(count):
            add_job(seed=seed, tenant=tenant)
    taken: Counter[str] = Counter()
    for most in (1, 3, 8, 2, 5, 7, 4, 6, 9, 12):
        taken.update(one.job.tenant for one in claim(repository, most))
        assert max(taken.values()) - min(taken[tenant] for tenant in "abc") <= 2
