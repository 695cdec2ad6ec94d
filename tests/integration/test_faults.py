"""Kill, freeze and fill what can be: no accepted job is lost, none is made twice."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest
from waiting import wait_until

if TYPE_CHECKING:
    from conftest import RunningServer, StartServer

pytestmark = [pytest.mark.integration, pytest.mark.quiet]

LONG = 250  # steps: a few seconds of the tiny model


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server_variables(request: pytest.FixtureRequest) -> dict[str, str]:
    """What leaves the server whole is done on both databases."""
    if request.param == "sqlite":
        return {}
    return {"MEDSORA_DATABASE_URL": request.getfixturevalue("postgres_url")}


def assert_made_once(server: "RunningServer", job_ids: list[str]) -> None:
    """Every job succeeded and has the files of one attempt, that of the video its row names, with the size it names."""
    jobs = [server.job(job_id) for job_id in job_ids]
    assert Counter(job.status.value for job in jobs) == {"succeeded": len(job_ids)}
    for job in jobs:
        assert job.artifact is not None
        endings = (".lossless.mkv", ".mp4", ".provenance.json", ".spritesheet.jpg", ".thumbnail.webp")
        made = [job.artifact.removesuffix(".mp4") + ending for ending in endings]
        assert sorted(name for name in server.files() if job.id in name) == made
        assert server.store.path(job.artifact).stat().st_size == job.size_bytes


def test_worker_killed_while_sampling(server: "RunningServer") -> None:
    undisturbed = server.wait_for(server.submit(steps=LONG, seed=3), "succeeded")
    job_id = server.submit(steps=LONG, seed=3)
    waiting = [server.submit(seed=seed) for seed in range(3)]
    server.wait_for_steps(job_id, 10)
    (pid,) = server.sampling_pids()
    server.child("worker").send_signal(signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    job = server.wait_for(job_id, "succeeded", "failed")
    for other in waiting:
        server.wait_for(other, "succeeded", "failed")
    assert_made_once(server, [job_id, *waiting])
    assert job.attempt == 2
    assert job.sha256 == undisturbed.sha256
    assert all(server.job(other).attempt == 1 for other in waiting)


def test_sampling_process_killed_alone(server: "RunningServer") -> None:
    server.wait_ready()
    job_id = server.submit(steps=LONG)
    server.wait_for_steps(job_id, 10)
    (pid,) = server.sampling_pids()
    os.kill(pid, signal.SIGKILL)
    assert server.wait_for(job_id, "succeeded", "failed").attempt == 2
    assert_made_once(server, [job_id])


def test_encoder_process_killed(server: "RunningServer") -> None:
    """Its clip is made again by the same sampling process, which is not held up."""
    server.wait_ready()
    sampling = server.sampling_pids()
    encoders = server.encoder_pids()
    for pid in encoders:
        os.kill(pid, signal.SIGSTOP)
    job_id = server.submit()
    wait_until(lambda: server.job(job_id).steps_done == 4, timeout_s=30, what="the end of its sampling")
    time.sleep(0.3)  # and it is sent to one of them
    for pid in encoders:
        os.kill(pid, signal.SIGKILL)
    assert server.wait_for(job_id, "succeeded", "failed").attempt == 2
    later = server.submit(seed=1)
    assert server.wait_for(later, "succeeded", "failed").attempt == 1
    assert_made_once(server, [job_id, later])
    assert server.sampling_pids() == sampling


def test_redis_killed_with_its_data_gone(server: "RunningServer") -> None:
    server.wait_ready()
    job_ids = [server.submit(steps=60, seed=seed) for seed in range(5)]
    server.wait_for_steps(job_ids[0], 5)
    redis = server.child("redis-server")
    redis.send_signal(signal.SIGKILL)
    slowest = 0.0
    for seed in range(5, 10):
        began = time.monotonic()
        job_ids.append(server.submit(seed=seed))
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 2.0
    for job_id in job_ids:
        server.wait_for(job_id, "succeeded", "failed")
    assert_made_once(server, job_ids)
    assert [server.job(job_id).attempt for job_id in job_ids] == [1] * 10
    assert server.child("redis-server").pid != redis.pid


def test_redis_frozen(server: "RunningServer") -> None:
    server.wait_ready()
    redis = server.child("redis-server")
    redis.suspend()
    try:
        began = time.monotonic()
        job_ids = [server.submit(seed=seed) for seed in range(3)]
        assert time.monotonic() - began < 2.0
        not_ready = server.http.get("/health/ready")
        assert not_ready.status_code == 503
        assert "broker" in not_ready.json()["error"]["message"]
    finally:
        redis.resume()
    for job_id in job_ids:
        server.wait_for(job_id, "succeeded", "failed", timeout_s=90)
    assert_made_once(server, job_ids)


def test_api_killed_while_a_job_runs(server: "RunningServer") -> None:
    server.wait_ready()
    job_id = server.submit(steps=LONG)
    server.wait_for_steps(job_id, 5)
    server.child("api").send_signal(signal.SIGKILL)
    # The supervisor holds the socket: this waits for the new process instead of being refused.
    assert httpx.get(f"{server.url}/videos/{job_id}", timeout=30.0).status_code == 200
    assert server.wait_for(job_id, "succeeded", "failed").attempt == 1
    assert_made_once(server, [job_id])


def test_frozen_worker_comes_back_too_late(server: "RunningServer", tmp_path: Path) -> None:
    server.wait_ready()
    job_id = server.submit(steps=LONG, seed=1)
    server.wait_for_steps(job_id, 10)
    (pid,) = server.sampling_pids()
    server.freeze(pid)
    environment = {
        **os.environ,
        **server.variables,
        "MEDSORA_DATA_DIR": str(server.data_dir),
        "MEDSORA_REDIS_URL": f"redis+socket://{server.data_dir / 'run' / 'redis.sock'}",
    }
    with (tmp_path / "second.log").open("w") as log:
        command = [sys.executable, "-m", "server.cli", "worker"]
        second = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2], stdout=log, stderr=log)
        try:
            job = server.wait_for(job_id, "succeeded", "failed", timeout_s=120)  # a whole worker starts first
            assert (job.status.value, job.attempt) == ("succeeded", 2)
            assert job.worker is not None
            assert f":{pid}:" not in job.worker
            os.kill(pid, signal.SIGCONT)
            # The first worker is back when it has done another job.
            second.terminate()
            second.wait(30)
            following = server.wait_for(server.submit(), "succeeded", "failed")
            assert following.worker is not None
            assert f":{pid}:" in following.worker
        finally:
            os.kill(pid, signal.SIGCONT)
            if second.poll() is None:
                second.kill()
                second.wait()
    assert server.job(job_id) == job, "the late worker changed a finished job"
    assert_made_once(server, [job_id])


def test_sampling_process_that_hangs_is_ended_by_its_time_limit(start_server: "StartServer") -> None:
    """It does not hear what Python is told: as in a kernel of a GPU, or stopped."""
    server = start_server(MEDSORA_JOB_TIME_LIMIT_S="12")
    job_id = server.submit(steps=120)  # more than a moment, and far from the limit
    server.wait_for_steps(job_id, 5)
    (pid,) = server.sampling_pids()
    server.freeze(pid)
    job = server.wait_for(job_id, "succeeded", "failed", timeout_s=90)
    assert (job.status.value, job.attempt) == ("succeeded", 2)
    assert not psutil.pid_exists(pid)
    assert_made_once(server, [job_id])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A data folder whose videos lie on a disk of their own with 96 KiB."""
    artifacts = tmp_path / "data" / "artifacts"
    artifacts.mkdir(parents=True)
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk; the same without a mount is in the unit tests")
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(artifacts)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield tmp_path / "data"
    subprocess.run(["umount", "--lazy", str(artifacts)], check=True)


def test_full_disk(start_server: "StartServer", small_disk: Path) -> None:
    server = start_server(small_disk)
    filler = small_disk / "artifacts" / "filler"
    with filler.open("wb") as file:
        file.write(b"x" * (88 * 1024))
    failed = server.wait_for(server.submit(), "succeeded", "failed")
    assert (failed.status.value, failed.error_code) == ("failed", "storage_full")
    assert server.files() == ["filler"], "a partial file was left"
    video = server.http.get(f"/v1/videos/{failed.id}")
    assert (video.status_code, video.json()["error"]["code"]) == (200, "storage_full")
    filler.unlink()
    following = server.submit()
    server.wait_for(following, "succeeded", "failed")
    assert_made_once(server, [following])
    assert server.stop() == 0


def test_stop_hands_back_the_job_and_the_next_start_finishes_it(start_server: "StartServer") -> None:
    server = start_server()
    job_id = server.submit(steps=LONG)
    server.wait_for_steps(job_id, 5)
    assert server.stop() == 0
    assert server.remaining_processes() == []
    assert server.said("MedSora Server is stopping")
    row = server.job(job_id)
    assert (row.status.value, row.attempt, row.handed_back) == ("queued", 1, 1)
    server.database.close()

    again = start_server()
    job = again.wait_for(job_id, "succeeded", "failed")
    assert (job.attempt, job.handed_back) == (2, 1)
    assert_made_once(again, [job_id])

    busy = again.submit(steps=LONG)
    again.wait_for_steps(busy, 5)
    again.process.kill()
    again.wait_until(lambda: not again.remaining_processes(), timeout_s=10, what="the end of everything after SIGKILL")
    again.wait_for_exit()


def test_truncated_or_altered_checkpoint(start_server: "StartServer", tiny_checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, damaged)
    weights = damaged / "denoiser.safetensors"
    content = weights.read_bytes()
    truncated, altered = content[:-1], content[:-1] + bytes([content[-1] ^ 1])
    weights.write_bytes(truncated)
    server = start_server(checkpoint=damaged, expect_ready=False)
    for damage in (truncated, altered):
        weights.write_bytes(damage)
        job = server.wait_for(server.submit(), "succeeded", "failed")
        assert (job.status.value, job.error_code) == ("failed", "checkpoint_invalid")
        assert job.error_message is not None
        assert "denoiser.safetensors" in job.error_message
        assert str(tmp_path) not in job.error_message
    ready = server.http.get("/health/ready")
    assert ready.status_code == 503
    assert "denoiser.safetensors" in ready.json()["checks"]["worker"]["reason"]
    assert str(tmp_path) not in ready.text
    assert server.files() == []
    weights.write_bytes(content)
    assert server.wait_for(server.submit(), "succeeded", "failed").status.value == "succeeded"
    server.wait_ready()
