"""What tenants may have: counted in the database, across processes, over HTTP and in batches (F38)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import select, update
from typer.testing import CliRunner

from server.api.dependencies import Services
from server.app import create_app
from server.batches.repository import BatchRepository, SubmittedLine
from server.cli import app
from server.jobs.database import Database, database_now
from server.jobs.intake import QuotaReachedError, insert_jobs
from server.jobs.model import Job
from server.jobs.repository import JobRepository
from server.keys.limits import (
    Limits,
    RequestAllowance,
    RequestLimiter,
    TenantLimits,
    UsageOfDay,
    fitting,
)
from server.keys.model import ALL_SCOPES
from server.settings import Settings

PROMPT = {"prompt": "covid-convex"}
A_CLIP = 16 * 32 * 32 / 1e6  # megapixel-frames of a clip of the tiny checkpoint


@pytest.fixture
def settings_database(database_url: str) -> SecretStr:
    """All of this is done on both databases."""
    return SecretStr(database_url)


@pytest.fixture
def limited(database: Database) -> Callable[..., JobRepository]:
    def make(**limits: Any) -> JobRepository:
        return JobRepository(database, lease_s=60.0, max_attempts=3, limits=Limits(**limits))

    return make


def let_a_day_pass(database: Database) -> None:
    with database.write() as connection:
        connection.execute(update(UsageOfDay).values(day=UsageOfDay.day - 1))


def services_of(client: TestClient) -> Services:
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    return services


# -- quotas --------------------------------------------------------------------------------------------------


def test_clips_a_day(limited: Callable[..., JobRepository], job_values: dict[str, Any], database: Database) -> None:
    repository = limited(clips_per_day=2)
    jobs = [repository.add(job_values, max_queued=100) for _ in range(2)]
    repository.request_cancel(jobs[0].id)
    repository.request_removal(jobs[1].id)
    repository.forget([jobs[1].id])
    with pytest.raises(QuotaReachedError, match="2 clips a day") as caught:
        repository.add(job_values, max_queued=100)
    assert 0 < caught.value.quota.retry_after_s <= 86_400
    assert not caught.value.quota.is_soon
    repository.add({**job_values, "tenant": "b"}, max_queued=100)
    let_a_day_pass(database)
    repository.add(job_values, max_queued=100)


def test_megapixel_frames_a_day(limited: Callable[..., JobRepository], job_values: dict[str, Any]) -> None:
    repository = limited(megapixel_frames_per_day=2.5 * A_CLIP)
    for _ in range(2):
        repository.add(job_values, max_queued=100)
    with pytest.raises(QuotaReachedError, match=r"0\.032768 are used, and this needs 0\.016384"):
        repository.add(job_values, max_queued=100)
    repository.add({**job_values, "num_frames": 8}, max_queued=100)


def test_jobs_that_wait(limited: Callable[..., JobRepository], job_values: dict[str, Any]) -> None:
    repository = limited(queued_jobs=2)
    jobs = [repository.add(job_values, max_queued=100) for _ in range(2)]
    with pytest.raises(QuotaReachedError, match="2 jobs of this tenant may wait") as caught:
        repository.add(job_values, max_queued=100)
    assert caught.value.quota.is_soon
    repository.claim(jobs[0].id, worker="w")
    repository.add(job_values, max_queued=100)


def test_tenants_may_have_limits_of_their_own(
    limited: Callable[..., JobRepository], job_values: dict[str, Any], database: Database
) -> None:
    defaults = Limits(clips_per_day=1, queued_jobs=50)
    repository, tenants = limited(clips_per_day=1, queued_jobs=50), TenantLimits(database, defaults)
    tenants.change("default", {"clips_per_day": 2})
    for _ in range(2):
        repository.add(job_values, max_queued=100)
    usage = tenants.usage("default")
    assert usage.limits == Limits(clips_per_day=2, queued_jobs=50)
    assert (usage.clips, usage.queued_jobs) == (2, 2)
    assert usage.megapixel_frames == pytest.approx(2 * A_CLIP)
    tenants.change("default", {"clips_per_day": 0})
    with pytest.raises(QuotaReachedError):
        repository.add(job_values, max_queued=100)
    tenants.change("default", {"clips_per_day": None, "queued_jobs": 3})
    assert tenants.usage("default").limits == Limits(clips_per_day=1, queued_jobs=3)
    assert tenants.usage("b").limits == defaults


def test_whoever_inserts_jobs_they_count(
    limited: Callable[..., JobRepository], job_values: dict[str, Any], database: Database
) -> None:
    with database.write() as connection:
        insert_jobs(connection, [job_values, {**job_values, "tenant": "b"}, job_values])
    tenants = TenantLimits(database, Limits())
    assert (tenants.usage("default").clips, tenants.usage("b").clips) == (2, 1)
    with pytest.raises(QuotaReachedError):
        limited(clips_per_day=2).add(job_values, max_queued=100)


def test_as_many_as_fit(database: Database, job_values: dict[str, Any]) -> None:
    jobs = [job_values] * 5
    for limits, share, number in (
        (Limits(), 1.0, 5),
        (Limits(clips_per_day=3), 1.0, 3),
        (Limits(megapixel_frames_per_day=2 * A_CLIP), 1.0, 2),
        (Limits(queued_jobs=4), 1.0, 4),
        (Limits(queued_jobs=4), 0.5, 2),
        (Limits(queued_jobs=1), 0.5, 1),
        (Limits(queued_jobs=0), 0.5, 0),
        (Limits(clips_per_day=3, queued_jobs=1), 1.0, 1),
    ):
        with database.write() as connection:
            fit = fitting(connection, "default", jobs, limits, queue_share=share)
        assert (fit.num_jobs, fit.quota is None) == (number, number == 5), limits


def test_processes_cannot_overdraw_together(
    settings: Settings, open_two_apps: Callable[[Settings], AbstractContextManager[list[TestClient]]]
) -> None:
    settings = settings.model_copy(update={"tenant_clips_per_day": 7, "max_queued_jobs": 1000})
    with open_two_apps(settings) as (one, other):
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda number: (one, other)[number % 2].post("/v1/videos", json=PROMPT), range(40)))
        assert sorted(answer.status_code for answer in answers) == [200] * 7 + [429] * 33
        assert len(one.get("/v1/videos", params={"limit": 100}).json()["data"]) == 7
        assert other.get("/v1/usage").json()["clips_per_day"] == {"used": 7, "limit": 7}


def test_a_used_up_day_over_http(settings: Settings) -> None:
    with TestClient(create_app(settings.model_copy(update={"tenant_clips_per_day": 1}))) as client:
        video = client.post("/v1/videos", json=PROMPT, headers={"idempotency-key": "k"})
        assert video.status_code == 200
        answer = client.post("/v1/videos", json=PROMPT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "quota_exceeded")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert answer.headers["x-should-retry"] == "false", "a client that waits for tomorrow helps nobody"
        assert 0 < int(answer.headers["retry-after"]) <= 86_400
        again = client.post("/v1/videos", json=PROMPT, headers={"idempotency-key": "k"})
        assert again.content == video.content, "what was made is answered, and counts once"
        usage = client.get("/v1/usage").json()
        assert usage["clips_per_day"] == {"used": 1, "limit": 1}
        assert usage["megapixel_frames_per_day"] == {"used": pytest.approx(A_CLIP), "limit": None}
        assert usage["queued_jobs"] == {"used": 1, "limit": None}
        assert usage["resets_at"] % 86_400 == 0


def test_a_full_queue_of_the_tenant_over_http(settings: Settings) -> None:
    with TestClient(create_app(settings.model_copy(update={"tenant_queued_jobs": 1}))) as client:
        assert client.post("/v1/videos", json=PROMPT).status_code == 200
        answer = client.post("/v1/videos", json=PROMPT)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (429, "true")
        assert int(answer.headers["retry-after-ms"]) == 2000


def test_lines_of_batches_wait_for_the_quota(
    database: Database, job_values: dict[str, Any], add_batch: Callable[[BatchRepository], Any]
) -> None:
    batches = BatchRepository(database, lease_s=60.0, limits=Limits(clips_per_day=3, queued_jobs=4))
    claim = add_batch(batches)
    refusal = {"status_code": 400, "body": {}}
    lines = [
        SubmittedLine(1, job_values, None),
        SubmittedLine(2, None, refusal),
        *(SubmittedLine(number, job_values, None) for number in range(3, 7)),
    ]
    made = batches.submit(claim, lines)
    assert len(made) == 2, "half of the places in the queue"
    assert [line.line for line in batches.pending(claim, limit=10)] == [4, 5, 6]
    repository = JobRepository(database, lease_s=60.0, max_attempts=3)
    for job_id in made:
        repository.request_cancel(job_id)
    assert len(batches.submit(claim, lines[3:])) == 1, "one more that day"
    assert batches.submit(claim, lines[4:]) == []
    assert [line.line for line in batches.pending(claim, limit=10)] == [5, 6]
    let_a_day_pass(database)
    assert len(batches.submit(claim, lines[4:])) == 1


@pytest.fixture
def add_batch() -> Callable[[BatchRepository], Any]:
    from server.batches.repository import CheckedLine

    def add(batches: BatchRepository) -> Any:
        batch = batches.add(
            tenant="default", endpoint="/v1/videos", input_file_id="file-1", completion_window="24h",
            output_expires_after_s=None, metadata=None, max_active=10,
        )  # fmt: skip
        claim = batches.claim(batch.seq)
        assert claim is not None
        lines = [CheckedLine(number, str(number), 0, 10) for number in range(1, 7)]
        batches.add_checked(claim, lines, [], checked_lines=6, checked_bytes=60)
        batches.end_validation(claim)
        batches.release(claim)
        claim = batches.claim(batch.seq)
        assert claim is not None
        return claim

    return add


# -- requests a minute -----------------------------------------------------------------------------------------


def test_requests_come_back_steadily(database: Database) -> None:
    limiter = RequestLimiter(database, Limits(requests_per_minute=60))
    rates = [limiter.take("a") for _ in range(60)]
    assert [rate.remaining for rate in rates if rate is not None][:2] == [59, 58]
    assert all(rate is not None and rate.retry_after_s == 0 for rate in rates)
    with database.write() as connection:  # nothing came back meanwhile
        connection.execute(update(RequestAllowance).values(remaining=0.25, at=database_now()))
    refused = limiter.take("a")
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(0.75, abs=0.1)
    assert refused.reset_s == pytest.approx(59.75, abs=0.1)
    other = limiter.take("b")
    assert other is not None
    assert other.remaining == 59
    with database.write() as connection:
        connection.execute(update(RequestAllowance).values(at=database_now() - 10.0))
    rate = limiter.take("a")
    assert rate is not None
    assert (rate.remaining, rate.retry_after_s) == (9, 0.0)
    with database.write() as connection:
        connection.execute(update(RequestAllowance).values(at=database_now() + 1000.0))
    later = limiter.take("a")
    assert later is not None
    assert later.remaining == 8, "a clock that was put back gives and takes nothing"


def test_no_limit_costs_no_write(database: Database) -> None:
    assert RequestLimiter(database, Limits()).take("a") is None
    with database.read() as connection:
        assert connection.execute(select(RequestAllowance.tenant)).all() == []


@pytest.fixture
def hurried(settings: Settings) -> Iterator[list[TestClient]]:
    """Two API processes, one database, three requests a minute."""
    settings = settings.model_copy(update={"tenant_requests_per_minute": 3})
    with TestClient(create_app(settings)) as one, TestClient(create_app(settings)) as other:
        yield [one, other]


def test_requests_a_minute_over_http(hurried: list[TestClient]) -> None:
    one, other = hurried
    answers = [client.get("/v1/models") for client in (one, other, one)]
    for number, answer in enumerate(answers):
        assert answer.status_code == 200
        assert answer.headers["ratelimit-limit"] == answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["ratelimit-remaining"] == str(2 - number)
        assert answer.headers["x-ratelimit-remaining-requests"] == str(2 - number)
        assert int(answer.headers["ratelimit-reset"]) == pytest.approx(20 * (number + 1), abs=2)
    for client in (other, one):
        for answer in (
            client.get("/v1/videos/video_" + "0" * 32),
            client.post("/v1/videos", json=PROMPT, headers={"idempotency-key": "k"}),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert answer.headers["x-should-retry"] == "true"
            assert 0 < int(answer.headers["retry-after-ms"]) <= 20_000
            assert 0 < int(answer.headers["retry-after"]) <= 20
            assert answer.headers["ratelimit-remaining"] == "0"
    for path in ("/health/live", "/metrics", "/openapi.json"):
        assert one.get(path).status_code == 200
        assert "ratelimit-limit" not in one.get(path).headers


def test_a_request_counts_once(hurried: list[TestClient]) -> None:
    client = hurried[0]
    headers = {"idempotency-key": "k"}
    for remaining in ("2", "1"):  # worked on, and replayed
        answer = client.post("/v1/videos", json=PROMPT, headers=headers)
        assert (answer.status_code, answer.headers.get_list("ratelimit-remaining")) == (200, [remaining])
    refused = client.post("/v1/videos", json={**PROMPT, "seed": 1}, headers=headers)
    assert (refused.status_code, refused.headers["ratelimit-remaining"]) == (422, "0")


def test_without_a_limit_there_are_no_headers(client: TestClient) -> None:
    assert not [name for name in client.get("/v1/models").headers if "ratelimit" in name]


def test_tenants_are_counted_apart(settings: Settings) -> None:
    settings = settings.model_copy(update={"keys": "required", "tenant_requests_per_minute": 1})
    with TestClient(create_app(settings)) as client:
        keys = services_of(client).keys
        bearers = [
            {"authorization": f"Bearer {keys.create(tenant=tenant, name='n', scopes=ALL_SCOPES)[1]}"}
            for tenant in ("a", "a", "b")
        ]
        assert [client.get("/v1/models", headers=one).status_code for one in bearers] == [200, 429, 200]
        assert client.get("/v1/models").status_code == 401, "who has no key uses up nothing"


# -- the command line ------------------------------------------------------------------------------------------


def test_limits_from_the_command_line(client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSORA_DATABASE_URL", settings.database_address)

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["keys", "limits", *words, "--data-dir", str(settings.data_dir)])
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    assert client.post("/v1/videos", json=PROMPT).status_code == 200
    assert run("default").splitlines() == [
        "clips per day: 1 used, unlimited",
        "megapixel frames per day: 0.016384 used, unlimited",
        "queued jobs: 1 used, unlimited",
        "requests per minute: unlimited",
    ]
    assert "clips per day: 1 used, limit 1" in run("default", "--clips-per-day", "1", "--requests-per-minute", "100")
    assert client.post("/v1/videos", json=PROMPT).status_code == 429, "holds at once"
    assert "limit 100" in run("default", "--clips-per-day", "2")
    assert client.post("/v1/videos", json=PROMPT).status_code == 200
    assert "limit" not in run("default", "--reset").replace("unlimited", "")
    with services_of(client).database.read() as connection:
        assert len(connection.execute(select(Job.id)).all()) == 2
