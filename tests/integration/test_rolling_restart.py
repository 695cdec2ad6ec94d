"""Hosts that share a database and a bucket and nothing else, restarted one after the other under load."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ports import free_port, free_ports
from s3_server import S3Server
from sqlalchemy import func, select
from waiting import wait_until

from server.embedded import find_redis_server
from server.events.model import Event
from server.jobs.database import Database
from server.jobs.repository import JobRepository
from server.jobs.schema import migrate
from server.jobs.workers import WorkerRegistry
from server.objects import objects_of
from server.settings import Settings
from server.storage import ArtifactStore, Variant

pytestmark = [pytest.mark.integration, pytest.mark.quiet]


WAITING = 10
"""Jobs that wait before the client holds back."""


class Host:
    """One process of the server with a data folder of its own."""

    def __init__(self, command: list[str], folder: Path, variables: dict[str, str]) -> None:
        self.command, self.folder, self.variables = command, folder, variables
        self.log = folder.with_suffix(".log")
        self.start()

    def start(self) -> None:
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("MEDSORA_", "TORCHINDUCTOR"))
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=Path(__file__).parents[2],
                env={**clean, **self.variables, "MEDSORA_DATA_DIR": str(self.folder)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End it as an operator does, and see that it ends well."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(90)
        # uvicorn ends in order, and then by the signal that it was told with
        is_good = code == 0 or (code == -signal.SIGTERM and "Finished server process" in self.log.read_text())
        assert is_good, f"{self.command} ended with {code}:\n{self.log.read_text()[-3000:]}"

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Cluster:
    """Two APIs, two workers and a reaper, each a host of its own."""

    def __init__(self, folder: Path, checkpoint: Path, s3_server: S3Server, settings: dict[str, str]) -> None:
        redis_port = free_port()
        self.bucket = s3_server.settings(s3_server.make_bucket())
        self.variables = {
            **settings,
            "MEDSORA_CHECKPOINTS": str(checkpoint),
            "MEDSORA_DATABASE_URL": f"sqlite:///{folder / 'shared' / 'medsora.db'}",
            "MEDSORA_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
            "MEDSORA_KEYS": "off",
            "MEDSORA_DRAIN_S": "3",
            "MEDSORA_BATCH_SIZES": "1",
            # one that is stopped has nobody to take its job but the other: no lease may have to run out for it
            "MEDSORA_LEASE_S": "60",
            **{f"MEDSORA_{name.upper()}": value for name, value in self.bucket.items()},
        }
        self.database = Database(self.variables["MEDSORA_DATABASE_URL"])
        migrate(self.database)
        redis_command = [find_redis_server(), "--port", str(redis_port), "--save", "", "--bind", "127.0.0.1"]
        (folder / "redis").mkdir()
        self.hosts = [Host([*redis_command, "--dir", str(folder / "redis")], folder / "redis", self.variables)]
        cli = [sys.executable, "-m", "server.cli"]
        self.ports = free_ports(2)
        ways = ["proxy", "redirect"]
        self.apis = [
            Host(
                [*cli, "api", "--port", str(port)],
                folder / f"api-{way}",
                {**self.variables, "MEDSORA_S3_DOWNLOADS": way},
            )
            for port, way in zip(self.ports, ways, strict=True)
        ]
        self.workers = [Host([*cli, "worker"], folder / f"worker-{number}", self.variables) for number in (1, 2)]
        self.hosts += [*self.apis, *self.workers, Host([*cli, "reaper"], folder / "reaper", self.variables)]
        self.urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        self.repository = JobRepository(self.database, lease_s=60.0, max_attempts=3)
        self.registry = WorkerRegistry(self.database, heartbeat_s=0.5)

    def wait_for_workers(self, count: int) -> None:
        """Wait until so many sampling processes are ready."""
        ready = lambda: len([one for one in self.registry.alive() if one.models and one.problem is None]) == count  # noqa: E731
        wait_until(ready, timeout_s=120, what=lambda: f"{count} workers; there are {self.registry.alive()}")

    def wait_for_api(self, number: int) -> None:
        """Wait until an API answers."""

        def answers() -> bool:
            try:
                return httpx.get(f"{self.urls[number]}/health/live", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers, timeout_s=90, what=lambda: self.apis[number].log.read_text()[-2000:])

    def close(self) -> None:
        for host in reversed(self.hosts):
            if host.process.poll() is None:
                host.process.terminate()
        for host in reversed(self.hosts):
            try:
                host.process.wait(30)
            except subprocess.TimeoutExpired:
                host.kill()
        self.database.close()


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Path,
    s3_server: S3Server,
    fast_settings: dict[str, str],
) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("hosts"), tiny_checkpoint, s3_server, fast_settings)
    try:
        made.wait_for_workers(2)
        for number in (0, 1):
            made.wait_for_api(number)
        yield made
    finally:
        made.close()


class Load:
    """A client that asks for one short video after the other, and tries again where it may.

    Args:
        has_enough: Whether so many wait that they outlast the restart of a worker.
    """

    def __init__(self, urls: list[str], has_enough: Callable[[], bool]) -> None:
        self.job_ids: list[str] = []
        self.problems: list[str] = []
        self.retries = 0
        self._urls, self._has_enough = urls, has_enough
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(timeout=30) as client:
            number = 0
            while not self._stop.wait(0.3):
                if self._has_enough():
                    continue
                number += 1
                self._ask(client, number)

    def _ask(self, client: httpx.Client, number: int) -> None:
        body = {"prompt": "covid lung", "seed": number, "num_inference_steps": 60}
        headers = {"idempotency-key": str(uuid.uuid4())}
        for attempt in range(100):
            url = self._urls[(number + attempt) % len(self._urls)]
            try:
                answer = client.post(f"{url}/v1/videos", json=body, headers=headers)
            except httpx.TransportError:
                self.retries += 1
                self._stop.wait(0.1)
                continue
            if answer.headers.get("x-should-retry") == "true":
                self.retries += 1
                self._stop.wait(0.1)
                continue
            if answer.status_code != 200:
                self.problems.append(f"{answer.status_code}: {answer.text}")
            else:
                self.job_ids.append(answer.json()["id"])
            return
        self.problems.append("no answer to 100 tries")


def test_nothing_is_lost_and_nothing_made_twice(cluster: Cluster) -> None:
    with Load(cluster.urls, has_enough=lambda: cluster.repository.count_waiting() >= WAITING) as load:
        for number, host in enumerate(cluster.workers):
            wait_until(lambda: len(load.job_ids) > 2 * (number + 1), timeout_s=60, what="load")  # noqa: B023
            host.stop()
            cluster.wait_for_workers(1)
            host.start()
            cluster.wait_for_workers(2)
        for number, host in enumerate(cluster.apis):
            host.stop()
            host.start()
            cluster.wait_for_api(number)
            more = len(load.job_ids) + 2
            wait_until(lambda: len(load.job_ids) > more, timeout_s=60, what="load")  # noqa: B023
    assert load.problems == []
    assert load.retries > 0, "nobody noticed a restart: there was no load"

    def all_done() -> bool:
        jobs = [cluster.repository.get(job_id) for job_id in load.job_ids]
        return all(job is not None and job.completed_at is not None for job in jobs)

    wait_until(all_done, timeout_s=120, what="the end of all jobs")
    jobs = [job for job in map(cluster.repository.get, load.job_ids) if job is not None]
    assert {job.status.value for job in jobs} == {"succeeded"}
    assert len(jobs) == len(set(load.job_ids))
    # no attempt was lost: each was made once, and before that only ever handed back
    assert {job.attempt - job.handed_back for job in jobs} == {1}
    with cluster.database.read() as connection:
        ends = select(func.count()).where(Event.kind == "video.completed").group_by(Event.subject)
        assert set(connection.scalars(ends)) == {1}


def test_hosts_share_but_a_database_and_a_bucket(cluster: Cluster, tmp_path: Path) -> None:
    with httpx.Client(timeout=60, follow_redirects=True) as client:
        made = client.post(f"{cluster.urls[0]}/v1/videos", json={"prompt": "covid lung", "num_inference_steps": 4})
        job_id = made.json()["id"]

        def done() -> Any:
            job = cluster.repository.get(job_id)
            return job if job is not None and job.status.value == "succeeded" else None

        job = wait_until(done, timeout_s=60, what="the video")
        for url, redirects in zip(cluster.urls, (0, 1), strict=True):
            whole = client.get(f"{url}/v1/videos/{job_id}/content")
            assert (whole.status_code, len(whole.history)) == (200, redirects)
            assert hashlib.sha256(whole.content).hexdigest() == job.sha256
            assert whole.headers["content-type"] == "video/mp4"
            assert f"{job_id}.mp4" in whole.headers["content-disposition"]
            direct = client.get(f"{url}/v1/videos/{job_id}/content", headers={"x-medsora-links": "none"})
            assert (direct.status_code, len(direct.history), direct.content) == (200, 0, whole.content)
            part = client.get(f"{url}/v1/videos/{job_id}/content", headers={"range": "bytes=10-19"})
            assert (part.status_code, part.content) == (206, whole.content[10:20])
            head = client.head(f"{url}/v1/videos/{job_id}/content")
            assert (head.status_code, head.headers["content-length"]) == (200, str(len(whole.content)))
            known = client.get(f"{url}/v1/videos/{job_id}/content", headers={"if-none-match": f'"{job.sha256}"'})
            assert known.status_code == 304
        beyond = client.get(f"{cluster.urls[0]}/v1/videos/{job_id}/content", headers={"range": "bytes=9999999-"})
        assert beyond.status_code == 416
        # an extension reads the video from the bucket, and can be watched from there while it is made
        more = {"video": {"id": job_id}, "num_frames": 16, "prompt": "covid lung"}
        answer = client.post(f"{cluster.urls[1]}/v1/videos/extensions", json=more)
        if answer.status_code == 200:
            stream = client.get(f"{cluster.urls[0]}/v1/videos/{answer.json()['id']}/stream")
            assert stream.status_code == 200
            assert stream.content[4:8] == b"ftyp"
        store = ArtifactStore(objects_of(Settings(data_dir=tmp_path, **cluster.bucket), "artifacts"))
        assert [found.job_id for found in store.files() if found.job_id == job_id] == [job_id] * len(Variant)
        assert client.delete(f"{cluster.urls[0]}/v1/videos/{job_id}").status_code == 200
        wait_until(
            lambda: job_id not in {found.job_id for found in store.files()}, timeout_s=30, what="an empty bucket"
        )
    for host in (*cluster.apis, *cluster.workers):
        left = [path for path in host.folder.rglob("*") if path.is_file() and "scratch" in path.parts]
        assert left == [], "what was written first is gone"
