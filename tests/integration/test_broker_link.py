"""A broker that is far away: connections that are dead, slow, cut or refused, and no memory left. No job is lost."""

import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import redis
from faulty_link import FaultyLink
from ports import free_port

from server.embedded import find_redis_server

if TYPE_CHECKING:
    from conftest import RunningServer

pytestmark = [pytest.mark.integration, pytest.mark.quiet]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    """A Redis of our own on a port of loopback."""
    port, folder = free_port(), tmp_path_factory.mktemp("redis")
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder), "--logfile", "log"]
    process = subprocess.Popen([find_redis_server(), *options])
    client = redis.Redis(port=port)
    deadline = time.monotonic() + 20
    while True:
        try:
            client.ping()
            break
        except redis.ConnectionError:
            assert time.monotonic() < deadline, "Redis does not start"
            time.sleep(0.05)
    yield client
    client.close()
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def link(broker: redis.Redis) -> Iterator[FaultyLink]:
    """The only way from the server to it."""
    made = FaultyLink(broker.connection_pool.connection_kwargs["port"])
    yield made
    made.close()


@pytest.fixture(scope="module")
def server_variables(link: FaultyLink) -> dict[str, str]:
    """The broker is at the other end of the link."""
    return {"MEDSORA_REDIS_URL": f"redis://127.0.0.1:{link.port}/0"}


def submit_quickly(server: "RunningServer", seeds: range) -> list[str]:
    """Ask for videos; whatever the broker does, each answer comes at once."""
    job_ids = []
    for seed in seeds:
        began = time.monotonic()
        job_ids.append(server.submit(seed=seed))
        assert time.monotonic() - began < 2.0
    return job_ids


def assert_made_once(server: "RunningServer", job_ids: list[str], *, within_s: float) -> None:
    """All jobs succeed, at the first attempt, and there is one video of each."""
    deadline = time.monotonic() + within_s
    for job_id in job_ids:
        server.wait_for(job_id, "succeeded", "failed", timeout_s=max(1.0, deadline - time.monotonic()))
    jobs = [server.job(job_id) for job_id in job_ids]
    assert Counter((job.status.value, job.attempt) for job in jobs) == {("succeeded", 1): len(jobs)}
    for job in jobs:
        assert [name for name in server.files() if job.id in name and name.endswith(".mp4")] == [job.artifact]


def test_connections_that_die_without_a_word(server: "RunningServer", link: FaultyLink) -> None:
    """Both ends think that they are connected; what Redis sends to the worker is lost on the way."""
    server.wait_ready()
    assert link.freeze() >= 3, "worker, API and reaper have a connection each"
    job_ids = submit_quickly(server, range(3))
    # a read gives up after 3 s, and so does each that follows it
    assert_made_once(server, job_ids, within_s=90)
    server.wait_ready()


def test_a_slow_link(server: "RunningServer", link: FaultyLink) -> None:
    link.delay_s = 0.2
    try:
        assert_made_once(server, submit_quickly(server, range(3)), within_s=90)
    finally:
        link.delay_s = 0.0


def test_connections_that_are_reset_in_the_middle_of_an_answer(server: "RunningServer", link: FaultyLink) -> None:
    link.cut_after = 200
    try:
        job_ids = submit_quickly(server, range(3))
        # the connections of before are cut as well
        link.refuse()
        link.listen()
        server.wait_until(lambda: server.said("failed: "), timeout_s=30, what="a publish or a look that failed")
    finally:
        link.cut_after = None
    assert_made_once(server, job_ids, within_s=90)


def test_a_broker_that_refuses_connections(server: "RunningServer", link: FaultyLink) -> None:
    link.refuse()
    try:
        job_ids = submit_quickly(server, range(3))
        not_ready = server.http.get("/health/ready")
        assert not_ready.status_code == 503
        assert not_ready.json()["checks"]["broker"]["status"] == "failing"
    finally:
        link.listen()
    assert_made_once(server, job_ids, within_s=90)
    server.wait_ready()


def test_a_broker_without_memory(server: "RunningServer", broker: redis.Redis) -> None:
    """Celery's worker ends when it cannot note what it took; whoever runs it starts it again."""
    server.wait_ready()
    assert broker.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    broker.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            broker.set("anything", 1)
        seen = len(server.lines)
        job_ids = submit_quickly(server, range(3))
        server.wait_until(
            lambda: any("maxmemory" in line for line in server.lines[seen:]), timeout_s=20, what="a failed publish"
        )
    finally:
        broker.config_set("maxmemory", 0)
    assert_made_once(server, job_ids, within_s=90)
    server.wait_ready()


def test_a_job_that_runs_while_its_connection_dies_is_made_once(server: "RunningServer", link: FaultyLink) -> None:
    server.wait_ready()
    job_id = server.submit(steps=250, seed=7)
    server.wait_for_steps(job_id, 5)
    link.freeze()
    assert_made_once(server, [job_id, *submit_quickly(server, range(1))], within_s=90)


def test_the_worker_of_such_a_job_soon_hears_the_broker_again(server: "RunningServer") -> None:
    """Its acknowledgement is lost. 4 s measured: 3 s until it is given up, and a look that finds it missing."""
    assert_made_once(server, submit_quickly(server, range(1)), within_s=30)
