"""From the start of a worker to its first job: told apart from one that is dead, and stopped at once."""

import json
import shutil
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from conftest import RunningServer, StartServer

pytestmark = [pytest.mark.integration, pytest.mark.quiet]


@pytest.fixture
def slow_to_warm_up(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of so many shapes that warming up for all of them takes many minutes."""
    copy = tmp_path / "slow"
    shutil.copytree(tiny_checkpoint, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["limits"]["sizes"] = [[256, 256 + 16 * number] for number in range(200)]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_sampling_processes_keep_what_they_compile_in_the_data_folder(server: "RunningServer") -> None:
    (pid,) = server.sampling_pids()
    environment = psutil.Process(pid).environ()
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        folder = server.data_dir / "compile-cache" / name
        assert environment[variable] == str(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_warm_up_is_seen_in_the_metrics(server: "RunningServer") -> None:
    text = server.http.get("/metrics").text
    assert 'medsora_worker_warm_up_seconds{batch_size="1",model="tiny"' in text


def test_process_whose_start_takes_too_long_is_replaced(start_server: "StartServer", slow_to_warm_up: Path) -> None:
    limit = {"MEDSORA_WARM_UP_SHAPES": "all", "MEDSORA_WORKER_START_LIMIT_S": "10"}
    server = start_server(checkpoint=slow_to_warm_up, expect_ready=False, **limit)
    server.wait_until(lambda: server.said("WORKER_START_LIMIT_S (10)"), timeout_s=60, what="the end of the first one")
    loaded = lambda: len([line for line in server.lines if "is loaded on" in line])  # noqa: E731
    server.wait_until(lambda: loaded() == 2, timeout_s=60, what="the start of another")
    assert server.stop() == 0
    assert server.remaining_processes() == []


def test_long_warm_up_is_told_and_broken_off(start_server: "StartServer", slow_to_warm_up: Path) -> None:
    server = start_server(checkpoint=slow_to_warm_up, expect_ready=False, MEDSORA_WARM_UP_SHAPES="all")
    server.wait_until(lambda: server.said("is loaded on"), timeout_s=60, what="the beginning of the warm-up")
    job_id = server.submit()
    time.sleep(3.0)  # signs of life are twice a second, and a worker without them is dead after ten seconds
    ready = server.http.get("/health/ready")
    assert ready.status_code == 503
    assert "is starting" in ready.json()["checks"]["worker"]["reason"]
    assert "medsora_worker_up{" in server.http.get("/metrics").text
    assert server.job(job_id).status.value == "queued"
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 15.0, "it went on to warm up"
    output = "\n".join(server.lines)
    assert "is broken off" in output
    assert "killed" not in output
    assert server.remaining_processes() == []
