"""A whole server in real processes: Redis, worker, API and reaper, started by ``medsora-server serve``."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from postgres_cluster import PostgresCluster
from waiting import wait_until

from server.jobs.database import Database
from server.jobs.repository import JobRecord, JobRepository
from server.jobs.workers import WorkerRegistry
from server.storage import ArtifactStore

FAST = {
    "MEDSORA_LEASE_S": "3",
    "MEDSORA_HEARTBEAT_S": "0.5",
    "MEDSORA_REAPER_INTERVAL_S": "0.5",
    "MEDSORA_REPUBLISH_AFTER_S": "2",
    "MEDSORA_PUBLISH_GRACE_S": "1",
    "MEDSORA_WORKER_HEARTBEAT_S": "0.5",
    "MEDSORA_PROGRESS_INTERVAL_S": "0",
    "MEDSORA_BATCH_INTERVAL_S": "0.25",
    "MEDSORA_MIN_FREE_BYTES": "0",
    "MEDSORA_DRAIN_S": "0",
    "MEDSORA_API_PROCESSES": "1",  # whatever the machine: tests look at it, and hurt it
    # Two processes that each start a thread a core slow each other down forty times; the tiny model needs one.
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session")
def fast_settings() -> dict[str, str]:
    """Variables of servers that are quick to notice things."""
    return dict(FAST)


def command_line(process: psutil.Process) -> list[str]:
    """Its arguments; none of one that has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _thread_states(pid: int) -> list[str]:
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return [stat.rpartition(")")[2].split()[0] for stat in stats]


class RunningServer:
    """A server and ways to look at it and to hurt it.

    Args:
        data_dir: Its data folder.
        checkpoint: The only one it serves.
        expect_ready: Wait until it says that it can generate.
        prefix: Program that starts it, such as nohup.
    """

    def __init__(
        self,
        data_dir: Path,
        checkpoint: Path,
        *,
        expect_ready: bool = True,
        prefix: Sequence[str] = (),
        **variables: str,
    ) -> None:
        self.data_dir = data_dir
        self.variables = {**FAST, "MEDSORA_CHECKPOINTS": str(checkpoint), **variables}
        # Torch, which other tests load into this process, writes where it caches into the environment.
        foreign = ("MEDSORA_", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "server.cli", "serve", "--port", "0", "--data-dir", str(data_dir)],
            cwd=Path(__file__).parents[2],
            env={**clean, **self.variables, "MEDSORA_DATA_DIR": str(data_dir)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._is_deaf = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            first = self._wait_for_line("listens on", timeout_s=120)
            if expect_ready:
                self._wait_for_line("is ready", timeout_s=120)
        except BaseException:
            self.process.terminate()
            raise
        match = re.search(r"http://\S+/v1", first)
        assert match is not None
        self.url = match.group()
        self.http = httpx.Client(base_url=self.url.removesuffix("/v1"), timeout=30.0)
        self.client = openai.OpenAI(base_url=self.url, api_key="any", max_retries=5)
        sqlite = f"sqlite:///{data_dir / 'medsora.db'}"
        self.database = Database(self.variables.get("MEDSORA_DATABASE_URL", sqlite))
        self.repository = JobRepository(self.database, lease_s=3.0, max_attempts=3)
        self.store = ArtifactStore(data_dir / "artifacts")

    wait_until = staticmethod(wait_until)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if self._is_deaf.is_set():
                break
        self.process.stdout.close()

    def stop_listening(self) -> None:
        """Close our end of its output at the next line: whatever it says after that fails."""
        self._is_deaf.set()

    def has_nobody_listening(self) -> bool:
        """Whether the output is closed."""
        return not self._reader.is_alive()

    def said(self, text: str) -> str:
        """The first line of output with this text, or an empty string."""
        if self.process.poll() is not None and text not in "\n".join(self.lines):
            raise AssertionError("the server has ended:\n" + "\n".join(self.lines[-40:]))
        return next((line for line in self.lines if text in line), "")

    def _wait_for_line(self, text: str, *, timeout_s: float) -> str:
        told = lambda: "\n".join([f"a line with {text!r}; what it said:", *self.lines[-40:]])  # noqa: E731
        return wait_until(lambda: self.said(text), timeout_s=timeout_s, what=told)

    def submit(self, *, steps: int = 4, seed: int = 0, prompt: str = "covid lung") -> str:
        """Ask for a video; returns its id."""
        body = {"prompt": prompt, "seed": seed, "num_inference_steps": steps}
        response = self.http.post("/v1/videos", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["id"])

    def job(self, job_id: str) -> JobRecord:
        """The row of a job."""
        job = self.repository.get(job_id)
        assert job is not None
        return job

    def wait_for(self, job_id: str, *statuses: str, timeout_s: float = 60.0) -> JobRecord:
        """Wait until a job has one of these states."""

        def reached() -> JobRecord | None:
            job = self.job(job_id)
            return job if job.status.value in statuses else None

        return wait_until(reached, timeout_s=timeout_s, what=lambda: f"{statuses} of {self.job(job_id)}")

    def wait_for_steps(self, job_id: str, steps: int) -> JobRecord:
        """Wait until the sampler of a job has done this many steps."""

        def reached() -> JobRecord | None:
            job = self.job(job_id)
            assert job.completed_at is None, f"finished too early for this test: {job}"
            return job if job.steps_done >= steps else None

        return wait_until(reached, timeout_s=30, what=f"{steps} steps of {job_id}")

    def wait_ready(self) -> None:
        """Wait until the server says that it can generate."""
        wait_until(lambda: self.http.get("/health/ready").status_code == 200, timeout_s=60, what="readiness")

    def child(self, command: str) -> psutil.Process:
        """The direct child that runs this part of the server."""
        return wait_until(lambda: self._find_child(command), timeout_s=20, what=f"process {command}")

    def _find_child(self, command: str) -> psutil.Process | None:
        for process in psutil.Process(self.process.pid).children():
            try:
                if command in process.cmdline() or command in Path(process.exe()).name:
                    return process
            except psutil.Error:
                continue
        return None

    def sampling_pids(self) -> list[int]:
        """Process ids of the live sampling processes."""
        records = WorkerRegistry(self.database, heartbeat_s=0.5).alive()
        return [pid for pid in (int(record.id.split(":")[1]) for record in records) if psutil.pid_exists(pid)]

    def encoder_pids(self) -> list[int]:
        """Process ids of the live encoder processes."""
        return [
            process.pid
            for process in psutil.Process(self.process.pid).children(recursive=True)
            if "server.worker.encoder" in command_line(process)
        ]

    def freeze(self, pid: int) -> None:
        """Stop a sampling process, but not in the middle of a write: SQLite's lock would be frozen with it.

        PostgreSQL ends the transaction of one that is silent for twenty seconds.
        """
        while True:
            os.kill(pid, signal.SIGSTOP)
            # One thread hears the signal, and the others go on until it has had its turn.
            wait_until(lambda: set(_thread_states(pid)) == {"T"}, timeout_s=10, what="the stop of all threads")
            if not self.database.is_sqlite:
                return
            probe = sqlite3.connect(self.data_dir / "medsora.db", timeout=0.1, isolation_level=None)
            try:
                probe.execute("BEGIN IMMEDIATE")
                probe.execute("ROLLBACK")
                return
            except sqlite3.OperationalError:
                os.kill(pid, signal.SIGCONT)
            finally:
                probe.close()

    def files(self) -> list[str]:
        """Names of all files in the store, partial ones included."""
        return [found.key for found in self.store.objects.list()]

    def remaining_processes(self) -> list[str]:
        """Every process of this server that still runs, found by the data folder in its environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("MEDSORA_DATA_DIR") == str(
                    self.data_dir
                ):
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found

    def stop(self) -> int:
        """Stop it with SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait_for_exit()

    def wait_for_exit(self) -> int:
        """Wait for its end, and close everything that looked at it."""
        code = self.process.wait(60)
        self._reader.join(10)
        self.http.close()
        self.client.close()
        self.database.close()
        return code


StartServer = Callable[..., RunningServer]


@pytest.fixture(scope="module")
def postgres_url(postgres_cluster: PostgresCluster) -> Iterator[str]:
    """An empty database on PostgreSQL."""
    name = postgres_cluster.create_database(is_empty=True)
    yield postgres_cluster.url(name)
    postgres_cluster.drop_database(name)


@pytest.fixture
def start_server(tmp_path: Path, tiny_checkpoint: Path) -> Iterator[StartServer]:
    """Start servers; all of them are stopped after the test."""
    started: list[RunningServer] = []

    def start(data_dir: Path | None = None, checkpoint: Path | None = None, **options: object) -> RunningServer:
        server = RunningServer(data_dir or tmp_path / "data", checkpoint or tiny_checkpoint, **options)  # type: ignore[arg-type]
        started.append(server)
        return server

    yield start
    for server in started:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="module")
def server_variables() -> dict[str, str]:
    """Settings of the server of a module, for modules that want others."""
    return {}


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, server_variables: dict[str, str]
) -> Iterator[RunningServer]:
    """One server for all tests of a module."""
    running = RunningServer(tmp_path_factory.mktemp("served") / "data", tiny_checkpoint, **server_variables)
    yield running
    assert running.stop() == 0, "\n".join(running.lines[-40:])
    assert running.remaining_processes() == []
