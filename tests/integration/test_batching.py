"""Jobs that are sampled together by a real worker: kills, cancellations, poison, lack of memory, shares."""

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import RunningServer, StartServer

pytestmark = pytest.mark.integration

LONG = 250  # steps: seconds of the tiny model
BATCHED = {"MEDSORA_BATCH_SIZES": "1,4", "MEDSORA_BATCH_WAIT_MS": "100", "MEDSORA_KEYS": "off"}

SABOTAGE = '''
"""Loaded by every Python process of a test's server: lets the pipeline fail for certain seeds."""
import os, signal, sys

if any("spawn_main" in part for part in sys.orig_argv):
    import medsora.pipeline as module

    call = module.VideoPipeline.__call__

    class OutOfMemoryError(RuntimeError):
        pass

    def sabotaged(self, requests, **options):
        seeds = [request.seed for request in requests]
        if any(seed == 666 for seed in seeds):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(seed == 777 for seed in seeds):
            raise ValueError("bad luck")
        if len(requests) > 2 and any(seed >= 5000 for seed in seeds):
            raise OutOfMemoryError("not enough")
        return call(self, requests, **options)

    module.VideoPipeline.__call__ = sabotaged
'''


@pytest.fixture
def sabotaged(start_server: "StartServer", tmp_path: Path) -> "RunningServer":
    """A server whose worker dies of seed 666, fails with 777, and has memory for two clips of seeds from 5000 on."""
    folder = tmp_path / "sabotage"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SABOTAGE)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return start_server(**BATCHED, PYTHONPATH=path)


def hold_up(server: "RunningServer", steps: int = 60) -> str:
    """Keep the worker busy with a job of another kind, so that what is asked for next waits together."""
    job_id = server.submit(steps=steps)
    server.wait_until(lambda: server.job(job_id).status.value == "running", timeout_s=30, what="the first job")
    return job_id


def finish(server: "RunningServer", job_ids: list[str]) -> list[str]:
    return [server.wait_for(job_id, "succeeded", "failed", "canceled").status.value for job_id in job_ids]


def test_worker_killed_in_a_batch(start_server: "StartServer") -> None:
    server = start_server(**BATCHED)
    hold_up(server)
    ids = [server.submit(steps=LONG, seed=seed) for seed in range(4)]
    server.wait_for_steps(ids[0], 10)
    assert [server.job(job_id).status.value for job_id in ids] == ["running"] * 4
    (pid,) = server.sampling_pids()
    os.kill(pid, signal.SIGKILL)
    assert finish(server, ids) == ["succeeded"] * 4
    jobs = [server.job(job_id) for job_id in ids]
    assert [job.attempt for job in jobs] == [2] * 4
    assert [job.batch_size for job in jobs] == [1] * 4, "whoever was there when a worker died runs alone"
    for job in jobs:
        assert sorted(name for name in server.files() if job.id in name) == [
            str(job.artifact).removesuffix(".mp4") + ending
            for ending in (".lossless.mkv", ".mp4", ".provenance.json", ".spritesheet.jpg", ".thumbnail.webp")
        ]


def test_cancel_one_in_a_batch(start_server: "StartServer") -> None:
    server = start_server(**BATCHED)
    hold_up(server)
    ids = [server.submit(steps=LONG, seed=seed) for seed in range(3)]
    server.wait_for_steps(ids[1], 10)
    assert server.http.delete(f"/v1/videos/{ids[1]}").status_code == 200
    assert finish(server, [ids[0], ids[2]]) == ["succeeded"] * 2
    assert [server.job(job_id).batch_size for job_id in (ids[0], ids[2])] == [3, 3]
    server.wait_until(lambda: not any(ids[1] in name for name in server.files()), timeout_s=10, what="no file of it")
    metrics = server.http.get("/metrics").text
    assert 'medsora_batch_size_bucket{le="2.0",model="tiny"} 1.0' in metrics
    assert 'medsora_batch_size_bucket{le="4.0",model="tiny"} 2.0' in metrics
    assert 'medsora_batch_size_sum{model="tiny"} 4.0' in metrics


def test_poison_job_dies_alone(sabotaged: "RunningServer") -> None:
    server = sabotaged
    hold_up(server)
    ids = [server.submit(seed=seed) for seed in (1, 666, 2, 3)]
    assert finish(server, ids) == ["succeeded", "failed", "succeeded", "succeeded"]
    poison, *others = (server.job(ids[index]) for index in (1, 0, 2, 3))
    assert (poison.error_code, poison.attempt) == ("attempts_exhausted", 3)
    assert all(job.attempt <= 2 for job in others)


def test_failure_and_lack_of_memory_stay_with_their_cause(sabotaged: "RunningServer") -> None:
    server = sabotaged
    hold_up(server)
    failing = [server.submit(seed=seed) for seed in (1, 2, 777, 3)]
    hungry = [server.submit(seed=5000 + seed, steps=5) for seed in range(4)]
    assert finish(server, failing) == ["succeeded", "succeeded", "failed", "succeeded"]
    assert server.job(failing[2]).error_code == "generation_failed"
    assert finish(server, hungry) == ["succeeded"] * 4
    jobs = [server.job(job_id) for job_id in (*failing, *hungry)]
    assert [job.attempt for job in jobs] == [1] * 8
    assert [job.batch_size for job in jobs[4:]] == [2] * 4


def test_priority_overtakes_and_deterministic_runs_alone(start_server: "StartServer") -> None:
    server = start_server(**BATCHED)

    def ask(**fields: object) -> str:
        answer = server.http.post("/v1/videos", json={"prompt": "covid lung", "num_inference_steps": 4, **fields})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    hold_up(server, LONG)
    usual = [ask(seed=seed) for seed in range(6)]
    urgent = ask(seed=9, num_inference_steps=5, priority=10)
    alone = [ask(seed=5, deterministic=True) for _ in range(2)]
    finish(server, [*usual, urgent, *alone])
    ends = {job_id: server.job(job_id).started_at for job_id in [*usual, urgent]}
    assert min(ends, key=lambda job_id: ends[job_id] or 0.0) == urgent
    first, second = (server.job(job_id) for job_id in alone)
    assert (first.batch_size, second.batch_size) == (1, 1)
    assert first.sha256 == second.sha256
    shown = server.http.get(f"/v1/videos/{urgent}").json()
    assert (shown["priority"], shown["deterministic"], shown["batch_size"]) == (10, False, 1)
    for priority in (11, -11, "high", 1.5):
        refused = server.http.post("/v1/videos", json={"prompt": "covid lung", "priority": priority})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")


def test_stop_hands_back_a_batch(start_server: "StartServer") -> None:
    server = start_server(**BATCHED)
    hold_up(server)
    ids = [server.submit(steps=1000, seed=seed) for seed in range(4)]
    server.wait_for_steps(ids[0], 5)
    assert server.stop() == 0
    rows = [server.job(job_id) for job_id in ids]
    assert [(row.status.value, row.attempt, row.handed_back) for row in rows] == [("queued", 1, 1)] * 4


def test_many_jobs_need_few_messages(start_server: "StartServer") -> None:
    server = start_server(**BATCHED)
    hold_up(server)
    ids = [server.submit(seed=seed) for seed in range(60)]
    began = time.monotonic()
    assert finish(server, ids) == ["succeeded"] * 60
    assert time.monotonic() - began < 60
    sizes = [server.job(job_id).batch_size for job_id in ids]
    assert sizes.count(4) >= 48, sizes
