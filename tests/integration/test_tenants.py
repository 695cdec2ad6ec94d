"""Keys, idempotency and quotas with real processes: two APIs, a broker that loses its memory, an API that is killed."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from ports import free_port
from sqlalchemy import select, update

from server.idempotency import IdempotentRequest
from server.jobs.database import Database
from server.jobs.model import Job
from server.keys.limits import Limits, TenantLimits
from server.keys.model import ALL_SCOPES
from server.keys.repository import KeyRepository

if TYPE_CHECKING:
    from tests.integration.conftest import RunningServer

pytestmark = pytest.mark.integration

ORDER = {"prompt": "covid lung", "num_inference_steps": 2}


class Api:
    """An API process on a port of its own."""

    def __init__(self, log: Path, *, port: int, **variables: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MEDSORA_")}
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server.cli", "api", "--port", str(port)],
                env={**clean, **variables},
                cwd=Path(__file__).parents[2],
                stdout=output,
                stderr=output,
            )
        self.url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self.process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, "the API does not answer"
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/live", timeout=2.0).status_code == 200
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(30) in (0, -signal.SIGTERM)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)


@pytest.fixture(scope="module")
def pair(
    server: "RunningServer", tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple["RunningServer", list[str]]]:
    """A server with keys, and the URLs of two API processes of it."""
    second = Api(
        tmp_path_factory.mktemp("second") / "second.log",
        port=free_port(),
        **server.variables,
        MEDSORA_DATA_DIR=str(server.data_dir),
        MEDSORA_REDIS_URL=f"redis+socket://{server.data_dir / 'run' / 'redis.sock'}",
    )
    yield server, [server.url.removesuffix("/v1"), second.url]
    second.stop()


def new_key(server: "RunningServer", tenant: str) -> dict[str, str]:
    _, key = KeyRepository(server.database).create(tenant=tenant, name="test", scopes=ALL_SCOPES)
    return {"authorization": f"Bearer {key}"}


def jobs_of(server: "RunningServer", tenant: str) -> list[Any]:
    page = server.repository.page(tenant=tenant, limit=1000, after=None, newest_first=False)
    assert page is not None
    return page[0]


def test_fifty_duplicates_through_two_processes_make_one_job(pair: tuple["RunningServer", list[str]]) -> None:
    server, urls = pair
    bearer = new_key(server, "fifty")

    def send(number: int) -> httpx.Response:
        headers = {**bearer, "idempotency-key": "one"}
        while True:
            answer = httpx.post(f"{urls[number % 2]}/v1/videos", files=_form(), headers=headers, timeout=60.0)
            if answer.status_code != 409:
                return answer
            assert answer.headers["x-should-retry"] == "true"
            time.sleep(int(answer.headers["retry-after-ms"]) / 1000)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(send, range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    (job,) = jobs_of(server, "fifty")
    server.wait_for(job.id, "succeeded")
    theirs = {**new_key(server, "someone"), "idempotency-key": "one"}
    assert httpx.post(f"{urls[0]}/v1/videos", files=_form(), headers=theirs).status_code == 200
    assert len(jobs_of(server, "someone")) == 1


def _form() -> dict[str, tuple[None, str]]:
    """A multipart body, with a boundary that no other has."""
    return {name: (None, str(value)) for name, value in ORDER.items()}


def test_quotas_hold_in_two_processes_and_after_the_broker_lost_its_memory(
    pair: tuple["RunningServer", list[str]],
) -> None:
    server, urls = pair
    bearer = new_key(server, "quota")
    limits = TenantLimits(server.database, Limits())
    limits.change("quota", {"clips_per_day": 20})

    def send(number: int) -> int:
        answer = httpx.post(f"{urls[number % 2]}/v1/videos", json=ORDER, headers=bearer, timeout=60.0)
        assert answer.status_code in (200, 429), answer.text
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "quota_exceeded"
            assert int(answer.headers["retry-after"]) > 0
        return answer.status_code

    with ThreadPoolExecutor(10) as pool:
        early = list(pool.map(send, range(10)))
        os.kill(server.child("redis").pid, signal.SIGKILL)
        late = list(pool.map(send, range(50)))
    assert early == [200] * 10
    assert late.count(200) == 10
    jobs = jobs_of(server, "quota")
    assert len(jobs) == 20
    assert limits.usage("quota").clips == 20
    for job in jobs:
        server.wait_for(job.id, "succeeded")
    assert send(0) == 429


def test_rate_limits_hold_in_two_processes(pair: tuple["RunningServer", list[str]]) -> None:
    server, urls = pair
    bearer = new_key(server, "rate")
    TenantLimits(server.database, Limits()).change("rate", {"requests_per_minute": 30})
    started = time.monotonic()

    def ask(number: int) -> int:
        return httpx.get(f"{urls[number % 2]}/v1/models", headers=bearer, timeout=60.0).status_code

    with ThreadPoolExecutor(20) as pool:
        statuses = list(pool.map(ask, range(100)))
    came_back = (time.monotonic() - started) * 30 / 60
    assert 30 <= statuses.count(200) <= 30 + came_back + 1
    assert set(statuses) == {200, 429}


def test_an_api_that_is_killed_makes_no_request_twice(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Clients send each request until it is answered, while the API is killed over and over."""
    port, kills = free_port(), random.Random(5)

    def start() -> Api:
        return Api(
            tmp_path / "api.log",
            port=port,
            MEDSORA_DATA_DIR=str(tmp_path / "data"),
            MEDSORA_CHECKPOINTS=str(tiny_checkpoint),
            MEDSORA_REDIS_URL="redis://127.0.0.1:1/0",
            MEDSORA_MIN_FREE_BYTES="0",
            MEDSORA_MAX_QUEUED_JOBS="100000",
        )

    api = start()
    database = Database(f"sqlite:///{tmp_path / 'data' / 'medsora.db'}")
    _, key = KeyRepository(database).create(tenant="a", name="test", scopes=ALL_SCOPES)
    is_over = threading.Event()
    answered: dict[str, str] = {}
    broken: list[str] = []

    def send(client: int) -> None:
        for number in itertools.count():
            name = f"{client}-{number}"
            headers = {"authorization": f"Bearer {key}", "idempotency-key": name}
            while name not in answered:
                if is_over.is_set():
                    return
                try:
                    answer = httpx.post(f"{api.url}/v1/videos", json=ORDER, headers=headers, timeout=20.0)
                except httpx.HTTPError:
                    broken.append(name)
                    time.sleep(0.05)
                    continue
                assert answer.status_code in (200, 409, 503), answer.text
                if answer.status_code == 200:
                    answered[name] = answer.json()["id"]

    num_kills = 4
    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(send, number) for number in range(6)]
        try:
            for _ in range(num_kills):
                time.sleep(kills.uniform(0.1, 0.5))
                api.kill()
                with database.write() as connection:  # what a minute of waiting does: nobody works on them now
                    connection.execute(update(IdempotentRequest).values(lease_until=0.0))
                api = start()
            time.sleep(2)
        finally:
            is_over.set()
        for client in clients:
            client.result()
    api.stop()
    with database.read() as connection:
        ids = set(connection.scalars(select(Job.id)))
        led_to = {row.object_id for row in connection.execute(select(IdempotentRequest.object_id))}
    database.close()
    print(f"{num_kills} kills, {len(broken)} broken requests, {len(answered)} keys answered, {len(ids)} jobs")
    assert len(answered) > num_kills
    assert len(set(answered.values())) == len(answered), "two keys have one job"
    assert set(answered.values()) <= ids
    assert ids <= led_to, "a job that no key leads to was made twice"
