"""Batches in real processes, driven by the unmodified OpenAI client; killed, and large."""

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import psutil
import pytest
from ports import free_port
from sqlalchemy import update

from server.batches.model import Batch
from server.jobs.database import Database, database_now
from server.jobs.model import Job

if TYPE_CHECKING:
    from conftest import RunningServer

pytestmark = [
    pytest.mark.integration,
    pytest.mark.quiet,
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
]

ENDED = ("completed", "failed", "expired", "cancelled")


def make_lines(count: int, *, steps: int = 4, **body: Any) -> bytes:
    """A file of lines that can be done, each with its number as seed."""
    lines = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/videos",
            "body": {"prompt": "covid lung", "seed": number, "num_inference_steps": steps, **body},
        }
        for number in range(count)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def start_batch(client: openai.OpenAI, content: bytes, **fields: Any) -> Any:
    """Upload lines and ask for a batch of them."""
    file = client.files.create(file=("lines.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h", **fields)


def wait_for_end(server: "RunningServer", batch_id: str, *, timeout_s: float = 120.0) -> Any:
    """Wait until a batch has ended."""

    def ended() -> Any:
        batch = server.client.batches.retrieve(batch_id)
        return batch if batch.status in ENDED else None

    return server.wait_until(ended, timeout_s=timeout_s, what=lambda: str(server.client.batches.retrieve(batch_id)))


def read_lines(client: openai.OpenAI, file_id: str | None) -> list[Any]:
    """Lines of an output or error file."""
    return [] if file_id is None else [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_files_as_the_client_sends_them(server: "RunningServer", tmp_path: Path) -> None:
    content = make_lines(3)
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    client = server.client
    with path.open("rb") as opened:
        first = client.files.create(
            file=opened, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
    assert (first.filename, first.bytes, first.status, first.purpose) == (
        "lines.jsonl", len(content), "processed", "batch",
    )  # fmt: skip
    assert first.expires_at == first.created_at + 3600
    others = [client.files.create(file=content, purpose="batch") for _ in range(3)]
    assert [file.id for file in client.files.list(limit=2, order="asc", purpose="batch")][-4:] == [
        file.id for file in (first, *others)
    ]
    assert client.files.retrieve(first.id) == first
    assert client.files.wait_for_processing(first.id) == first
    assert client.files.content(first.id).read() == content
    for file in (first, *others):
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError, match="no file with the id"):
            client.files.content(file.id)
    with pytest.raises(openai.BadRequestError, match="allowed: batch") as caught:
        client.files.create(file=content, purpose="fine-tune")
    assert caught.value.param == "purpose"


def test_a_batch_from_lines_to_videos(server: "RunningServer") -> None:
    client = server.client
    content = make_lines(4) + make_lines(1, prompt="a cat").replace(b"line-0", b"bad")
    made = start_batch(client, content, metadata={"study": "lungs"})
    assert (made.status, made.metadata) == ("validating", {"study": "lungs"})
    batch = wait_for_end(server, made.id)
    assert (batch.status, batch.errors) == ("completed", None)
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (5, 4, 1)
    output = read_lines(client, batch.output_file_id)
    assert [line["custom_id"] for line in output] == [f"line-{number}" for number in range(4)]
    for number, line in enumerate(output):
        video = line["response"]["body"]
        assert (line["response"]["status_code"], video["status"], video["seed"]) == (200, "completed", number)
        content = client.videos.download_content(video["id"]).read()
        assert hashlib.sha256(content).hexdigest() == video["sha256"]
        assert server.http.get(video["content_url"]).content == content
    (refused,) = read_lines(client, batch.error_file_id)
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("bad", 400)
    assert "no label 'a cat'" in refused["response"]["body"]["error"]["message"]
    alone = server.wait_for(server.submit(seed=2), "succeeded")
    assert alone.sha256 == output[2]["response"]["body"]["sha256"], "a line and a request made different videos"


def test_lists_and_wrong_batches(server: "RunningServer") -> None:
    client = server.client
    ids = [start_batch(client, b"nonsense\n").id for _ in range(3)]
    for batch_id in ids:
        batch = wait_for_end(server, batch_id)
        assert (batch.status, [error.line for error in batch.errors.data]) == ("failed", [1])
    assert [batch.id for batch in client.batches.list(limit=2)][:3] == ids[::-1]
    with pytest.raises(openai.ConflictError, match="cannot be cancelled any more: it is failed"):
        client.batches.cancel(ids[0])
    with pytest.raises(openai.NotFoundError, match="no batch with the id"):
        client.batches.retrieve("batch_1")
    file = client.files.create(file=make_lines(1), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="allowed: 1h, 6h, 12h, 24h, 3d, 7d"):
        client.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="2h")  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="allowed: /v1/videos"):
        client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")


def test_cancelled_while_it_runs(server: "RunningServer") -> None:
    client = server.client
    made = start_batch(client, make_lines(2) + make_lines(6, steps=1000).replace(b"line-", b"long-"))
    server.wait_until(
        lambda: client.batches.retrieve(made.id).request_counts.completed == 2,
        timeout_s=60,
        what="two lines",  # type: ignore[union-attr]
    )
    assert client.batches.cancel(made.id).status == "cancelling"
    batch = wait_for_end(server, made.id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("cancelled", 2, 6)
    assert len(read_lines(client, batch.output_file_id)) == 2
    codes = Counter(line["error"]["code"] for line in read_lines(client, batch.error_file_id))
    assert codes == {"batch_cancelled": 6}
    assert server.wait_for(server.submit(), "succeeded").attempt == 1, "the worker is free again"


def test_cancelled_by_many_at_once_through_two_processes(server: "RunningServer", tmp_path: Path) -> None:
    """Whatever wins, each line is in one of the files, and what is in the output has its video."""
    environment = {
        **os.environ,
        **server.variables,
        "MEDSORA_KEYS": "off",
        "MEDSORA_DATA_DIR": str(server.data_dir),
        "MEDSORA_REDIS_URL": f"redis+socket://{server.data_dir / 'run' / 'redis.sock'}",
    }
    port = free_port()
    with (tmp_path / "second.log").open("w") as log:
        command = [sys.executable, "-m", "server.cli", "api", "--port", str(port)]
        second = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2], stdout=log, stderr=log)
        other = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=10)
        try:
            file = other.files.create(file=make_lines(12), purpose="batch")
            assert server.client.files.content(file.id).read() == make_lines(12), "the other process sees the file"
            ids = []
            for _ in range(8):
                batch = server.client.batches.create(
                    input_file_id=file.id, endpoint="/v1/videos", completion_window="24h"
                )
                ids.append(batch.id)
            moments = random.Random(3)

            def cancel(batch_id: str, delay_s: float) -> None:
                time.sleep(delay_s)
                for client in (server.client, other):
                    with suppress(openai.ConflictError):
                        assert client.batches.cancel(batch_id).status in ("cancelling", "cancelled")

            jobs = [(batch_id, moments.uniform(0.0, 3.0)) for batch_id in ids for _ in range(6)]
            threads = [threading.Thread(target=cancel, args=job) for job in jobs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            statuses = Counter(wait_for_end(server, batch_id).status for batch_id in ids)
            assert statuses["cancelled"] > 0, statuses
            for batch_id in ids:
                batch = server.client.batches.retrieve(batch_id)
                assert batch == other.batches.retrieve(batch_id)
                assert batch.status in ("completed", "cancelled")
                output, errors = (read_lines(other, one) for one in (batch.output_file_id, batch.error_file_id))
                counts = batch.request_counts
                assert (counts.completed, counts.failed) == (len(output), len(errors))
                names = sorted(line["custom_id"] for line in output + errors)
                assert names in ([], sorted(f"line-{number}" for number in range(12)))
                for line in output:
                    assert server.job(line["response"]["body"]["id"]).status.value == "succeeded"
                assert {line["error"]["code"] for line in errors} <= {"batch_cancelled"}
            waiting = [job for job in _all_jobs(server) if job.status.value in ("queued", "running")]
            assert waiting == []
        finally:
            other.close()
            second.kill()
            second.wait()


def test_expired_while_it_runs(server: "RunningServer") -> None:
    client = server.client
    made = start_batch(client, make_lines(1) + make_lines(3, steps=1000).replace(b"line-", b"long-"))
    server.wait_until(
        lambda: client.batches.retrieve(made.id).request_counts.completed == 1,
        timeout_s=60,
        what="one line",  # type: ignore[union-attr]
    )
    with server.database.write() as connection:
        connection.execute(update(Batch).where(Batch.id == made.id).values(expires_at=database_now()))
    batch = wait_for_end(server, made.id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("expired", 1, 3)
    assert batch.expired_at is not None
    codes = Counter(line["error"]["code"] for line in read_lines(client, batch.error_file_id))
    assert codes == {"batch_expired": 3}


def test_killed_again_and_again_nothing_is_lost_or_done_twice(server: "RunningServer", tmp_path: Path) -> None:
    """Three processes work off two batches, and one of them is killed at a random moment, again and again."""
    environment = {
        **os.environ,
        **server.variables,
        "MEDSORA_KEYS": "off",
        "MEDSORA_DATA_DIR": str(server.data_dir),
        "MEDSORA_REDIS_URL": f"redis+socket://{server.data_dir / 'run' / 'redis.sock'}",
        "MEDSORA_LEASE_S": "1",
        "MEDSORA_HEARTBEAT_S": "0.4",
        "MEDSORA_BATCH_QUEUED_JOBS": "7",
        "MEDSORA_BATCH_INTERVAL_S": "0.05",
    }
    command = [sys.executable, "-m", "server.cli", "reaper"]
    moments = random.Random(5)
    count, kills = 50, 0
    before = {job.id for job in _all_jobs(server)}
    with (tmp_path / "reapers.log").open("w") as log:

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2], stdout=log, stderr=log)

        running = [start(), start()]
        try:
            ids = [start_batch(server.client, make_lines(count, steps=8)).id for _ in range(2)]
            deadline = time.monotonic() + 200
            while any(server.client.batches.retrieve(batch_id).status not in ENDED for batch_id in ids):
                assert time.monotonic() < deadline, [server.client.batches.retrieve(batch_id) for batch_id in ids]
                # Not before something has happened: a loaded machine may take seconds to start a process.
                seen, give_up = len(_all_jobs(server)), time.monotonic() + 10.0
                while len(_all_jobs(server)) == seen and time.monotonic() < give_up:
                    time.sleep(0.05)
                time.sleep(moments.uniform(0.0, 0.6))
                number = moments.randrange(3)
                if number == 2:
                    server.child("reaper").kill()
                else:
                    running[number].kill()
                    running[number].wait()
                    running[number] = start()
                kills += 1
        finally:
            for process in running:
                process.kill()
                process.wait()
    assert kills >= 5, kills
    made = [job for job in _all_jobs(server) if job.id not in before]
    assert len(made) == 2 * count, "a line has no job, or two"
    assert Counter(job.seed for job in made) == dict.fromkeys(range(count), 2)
    for batch_id in ids:
        batch = server.client.batches.retrieve(batch_id)
        assert batch.request_counts is not None
        assert (batch.status, batch.request_counts.completed, batch.error_file_id) == ("completed", count, None)
        output = read_lines(server.client, batch.output_file_id)
        assert [line["custom_id"] for line in output] == [f"line-{number}" for number in range(count)]
        assert {line["response"]["body"]["seed"] for line in output} == set(range(count))


def _all_jobs(server: "RunningServer") -> list[Any]:
    jobs, after = [], None
    while True:
        page = server.repository.page(limit=100, after=after, newest_first=False)
        assert page is not None
        jobs += page[0]
        if not page[1]:
            return jobs
        after = jobs[-1].id


class MemoryWatch:
    """Notes the most memory of processes that it has seen, in MiB."""

    def __init__(self, **processes: int) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in processes.items()}
        self.peak = dict.fromkeys(processes, 0.0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            for name, process in self._processes.items():
                self.peak[name] = max(self.peak[name], process.memory_info().rss / 2**20)

    def restart(self) -> dict[str, float]:
        """What it has seen so far; forgets it."""
        seen, self.peak = self.peak, dict.fromkeys(self.peak, 0.0)
        return seen

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()


@pytest.mark.slow
def test_fifty_thousand_lines_take_no_more_memory_than_a_thousand(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """API and reaper are real processes; workers, which would take hours, are one UPDATE now and then."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MEDSORA_")},
        "MEDSORA_DATA_DIR": str(tmp_path / "data"),
        "MEDSORA_CHECKPOINTS": str(tiny_checkpoint),
        "MEDSORA_REDIS_URL": "redis://127.0.0.1:1/0",
        "MEDSORA_MIN_FREE_BYTES": "0",
        "MEDSORA_MAX_QUEUED_JOBS": "100000",
        "MEDSORA_BATCH_QUEUED_JOBS": "5000",
        "MEDSORA_BATCH_INTERVAL_S": "0.1",
        "MEDSORA_LOG_LEVEL": "error",
        "MEDSORA_KEYS": "off",
    }
    port = free_port()
    command = [sys.executable, "-m", "server.cli"]
    place: dict[str, Any] = {"env": environment, "cwd": Path(__file__).parents[2], "stderr": subprocess.DEVNULL}
    api = subprocess.Popen([*command, "api", "--port", str(port)], **place)
    reaper = subprocess.Popen([*command, "reaper"], **place)
    database = Database(f"sqlite:///{tmp_path / 'data' / 'medsora.db'}")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=10)
    watch = MemoryWatch(api=api.pid, reaper=reaper.pid)
    try:
        for _ in range(2):  # the first fills the caches of the libraries
            _work_off(client, database, make_lines(1000))
            small = watch.restart()
        # As large as a file may be, too: blanks are no part of a JSON value.
        content = make_lines(50_000).replace(b'{"custom_id"', b"{" + b" " * 4000 + b'"custom_id"')
        assert 190 * 2**20 < len(content) < 200 * 2**20
        batch = _work_off(client, database, content)
        large = watch.restart()
        assert batch.request_counts.completed == 50_000
        custom_ids = set()
        with client.files.with_streaming_response.content(batch.output_file_id) as response:
            for line in response.iter_lines():
                custom_ids.add(json.loads(line)["custom_id"])
        assert len(custom_ids) == 50_000
        print(f"MiB with 1000 lines: {small}; with 50000 ({len(content) / 2**20:.1f} MiB): {large}")
        assert large["api"] < small["api"] + 24, (small, large)
        assert large["reaper"] < small["reaper"] + 24, (small, large)
    finally:
        watch.close()
        client.close()
        database.close()
        for process in (api, reaper):
            process.kill()
            process.wait()


def _work_off(client: openai.OpenAI, database: Database, content: bytes) -> Any:
    """Run a batch to its end, with one UPDATE in place of the workers."""
    made = start_batch(client, content)
    deadline = time.monotonic() + 240
    done = {
        "status": "succeeded",
        "artifact": "00/video_" + "0" * 32 + ".1.mp4",
        "sha256": "0" * 64,
        "sampling_s": 1.0,
        "completed_at": database_now(),
    }
    while True:
        with database.write() as connection:
            connection.execute(update(Job).where(Job.status == "queued").values(**done))
        batch = client.batches.retrieve(made.id)
        if batch.status in ENDED:
            assert batch.status == "completed", batch
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
