"""PostgreSQL goes away and comes back while jobs are made and asked for: none is lost, and none is made twice."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest
from postgres_cluster import PostgresCluster

if TYPE_CHECKING:
    from conftest import RunningServer

pytestmark = [pytest.mark.integration, pytest.mark.quiet, pytest.mark.timeout(600)]

LONG = 1000  # steps: some seconds of the tiny model, longer than an outage
SHORT = 60


@pytest.fixture(scope="module")
def server_variables(postgres_url: str) -> dict[str, str]:
    return {"MEDSORA_DATABASE_URL": postgres_url, "MEDSORA_MAX_ATTEMPTS": "10"}


@pytest.fixture
def orders(server: "RunningServer") -> Iterator[dict[str, str]]:
    """Idempotency key -> job of orders that a client sends all the time, each until it is answered."""
    answered: dict[str, str] = {}
    is_over = threading.Event()
    refused: Counter[int] = Counter()

    def send() -> None:
        while not is_over.is_set():
            key = f"order-{len(answered)}-{time.monotonic()}"
            body = {"prompt": "covid lung", "seed": len(answered), "num_inference_steps": 4}
            while True:  # to the end: what was accepted without an answer must not be counted as lost
                answer = httpx.post(f"{server.url}/videos", json=body, headers={"idempotency-key": key}, timeout=60.0)
                if answer.status_code == 200:
                    answered[key] = answer.json()["id"]
                    break
                assert answer.status_code in (409, 503), answer.text
                if answer.status_code == 503:
                    assert answer.json()["error"]["code"] == "database_unavailable", answer.text
                refused[answer.status_code] += 1
                time.sleep(0.1)
            is_over.wait(0.3)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield answered
    finally:
        is_over.set()
        thread.join(120)
    assert refused[503] > 0, "no request met the outage"


@pytest.mark.parametrize(
    ("how", "steps"), [(signal.SIGINT, LONG), (signal.SIGQUIT, LONG), (signal.SIGINT, SHORT)],
    ids=["restart", "crash", "restart while a job ends"],
)  # fmt: skip
def test_restart_in_the_middle_of_jobs(
    server: "RunningServer", postgres_cluster: PostgresCluster, orders: dict[str, str], how: signal.Signals, steps: int
) -> None:
    server.wait_ready()
    job_id = server.submit(steps=steps)
    server.wait_for_steps(job_id, 10)
    had = len(orders)
    postgres_cluster.stop(how)
    try:
        ready = server.http.get("/health/ready")
        assert ready.status_code == 503
        assert "database" in ready.json()["error"]["message"]
        # clients, the worker and the reaper all find it gone
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            assert server.http.get("/health/live").status_code == 200
            assert server.http.get(f"/v1/videos/{job_id}").status_code == 503
            time.sleep(0.1)
    finally:
        postgres_cluster.start()
    server.wait_ready()
    server.wait_until(lambda: len(orders) > had + 2, timeout_s=60, what="answers after the outage")
    job_ids = [job_id, *orders.values()]
    for one in job_ids:
        server.wait_for(one, "succeeded", "failed", "canceled", timeout_s=120)
    jobs = [server.job(one) for one in job_ids]
    assert Counter(job.status.value for job in jobs) == {"succeeded": len(jobs)}
    assert len(set(job_ids)) == len(job_ids)
    for job in jobs:
        made = sorted(name for name in server.files() if job.id in name and name.endswith(".mp4"))
        assert made == [job.artifact], f"{job.id} was made twice, or its row names another file"
    assert server.http.get("/v1/videos", params={"limit": 100}).json()["data"]
    assert not any("Traceback" in line for line in server.lines), "\n".join(server.lines)
