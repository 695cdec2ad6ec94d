"""A hundred random kills of every part of a server under load: no accepted job is lost, and none is made twice."""

import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest
from sqlalchemy import func, select

from server.jobs.model import Job, JobStatus

if TYPE_CHECKING:
    from conftest import RunningServer, StartServer

pytestmark = [pytest.mark.integration, pytest.mark.quiet, pytest.mark.timeout(1200)]

KILLS = {"sampling process": 12, "worker": 7, "encoder": 12, "redis-server": 25, "api": 19, "reaper": 25}
"""A hundred. What samples takes seconds to be back, and is killed while it works on something."""
CLIENTS = 8
WAITING = 12
"""Jobs that wait before clients hold back: enough that there is always work, few enough to be made at the end."""
ENDINGS = (".lossless.mkv", ".mp4", ".provenance.json", ".spritesheet.jpg", ".thumbnail.webp")


class Clients:
    """Threads that send requests, each again and again under one key until it is answered."""

    def __init__(self, url: str) -> None:
        self.answered: dict[str, str] = {}
        """Idempotency key -> id of its job."""
        self.broken = 0
        self._url, self._lock = url, threading.Lock()
        self._is_over, self._holds_back = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def hold_back(self, is_enough: bool) -> None:
        (self._holds_back.set if is_enough else self._holds_back.clear)()

    def stop(self) -> None:
        """Let every request that was begun be answered."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a request is never answered"

    def _run(self, client: int) -> None:
        count = 0
        while not self._is_over.is_set():
            if self._holds_back.is_set():
                time.sleep(0.05)
                continue
            key, count = f"client-{client}-request-{count}", count + 1
            body = {"prompt": "covid lung", "seed": count, "num_inference_steps": 10 + 100 * (count % 3)}
            job_id = self._send(key, body)
            with self._lock:
                self.answered[key] = job_id

    def _send(self, key: str, body: dict[str, object]) -> str:
        while True:
            try:
                answer = httpx.post(f"{self._url}/videos", json=body, headers={"idempotency-key": key}, timeout=30.0)
            except httpx.HTTPError:
                self.broken += 1
            else:
                if answer.status_code == 200:
                    return str(answer.json()["id"])
                # the API that had the request before is dead, and its lease on the key not over
                assert answer.status_code in (409, 503), answer.text
            time.sleep(0.1)


def kill(server: "RunningServer", part: str, killed: set[int]) -> bool:
    """Kill a part that lives and was not killed before; False where there is none yet."""
    if part == "sampling process":
        pids = server.sampling_pids()
    elif part == "encoder":
        pids = server.encoder_pids()
    else:
        found = server._find_child(part)
        pids = [] if found is None else [found.pid]
    fresh = [pid for pid in pids if pid not in killed]
    if not fresh:
        return False
    try:
        if part == "worker":
            # with its sampling process, which would live on until it notices
            for child in psutil.Process(fresh[0]).children(recursive=True):
                child.kill()
        os.kill(fresh[0], signal.SIGKILL)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
    killed.add(fresh[0])
    return True


def is_at_work(server: "RunningServer") -> bool:
    """Whether a job has had a step, and is not one that was hit so often that the next kill would use it up."""
    running = Job.status == JobStatus.RUNNING.value
    query = select(func.count(), func.max(Job.attempt)).where(running, Job.steps_done > 0)
    with server.database.read() as connection:
        count, most = connection.execute(query).one()
    return bool(count) and most < 7


def test_a_hundred_random_kills(start_server: "StartServer", tmp_path: Path) -> None:
    # attempts that the kills use up are not what is tested here
    server = start_server(MEDSORA_MAX_ATTEMPTS="10", MEDSORA_ORPHAN_SCAN_S="2", MEDSORA_RESTART_PAUSE_S="0.4")
    server.wait_ready()
    chance, kinds, killed = random.Random(11), Counter[str](), set[int]()
    clients = Clients(server.url)
    try:
        deadline = time.monotonic() + 800
        while sum(kinds.values()) < sum(KILLS.values()):
            assert time.monotonic() < deadline, f"only {kinds} in time"
            clients.hold_back(server.repository.count_waiting() >= WAITING)
            left = [part for part, wanted in KILLS.items() if kinds[part] < wanted]
            part = chance.choices(left, [KILLS[part] - kinds[part] for part in left])[0]
            uses_attempts = part in ("sampling process", "worker", "encoder")
            if (not uses_attempts or is_at_work(server)) and kill(server, part, killed):
                kinds[part] += 1
                time.sleep(chance.uniform(0.05, 1.0))
            else:
                time.sleep(0.05)
    finally:
        clients.stop()
    assert kinds == KILLS

    job_ids = sorted(clients.answered.values())
    for job_id in job_ids:
        server.wait_for(job_id, "succeeded", "failed", "canceled", timeout_s=180)
    jobs = [server.job(job_id) for job_id in job_ids]
    print(
        f"{dict(kinds)}; {len(jobs)} jobs, {clients.broken} broken requests, "
        f"{sum(job.attempt for job in jobs)} attempts"
    )
    assert len(set(job_ids)) == len(job_ids), "two keys have one job"
    with server.database.read() as connection:
        rows = connection.scalar(select(func.count()).select_from(Job))
    assert rows == len(job_ids), "a request that was sent again made a second job"
    assert Counter(job.status.value for job in jobs) == {"succeeded": len(jobs)}
    assert sum(job.attempt for job in jobs) >= len(jobs) + 5, "hardly a kill hit a running job"

    def only_what_the_rows_name() -> bool:
        named = {str(job.artifact).removesuffix(".mp4") + ending for job in jobs for ending in ENDINGS}
        return set(server.files()) == named

    # what killed attempts left is swept
    server.wait_until(only_what_the_rows_name, timeout_s=60, what="no file but those of the attempts that count")
