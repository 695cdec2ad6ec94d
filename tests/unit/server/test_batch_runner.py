"""Lines of a batch from file to files; killed anywhere, none is submitted twice and none is lost."""

import base64
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import SecretStr
from sqlalchemy import delete, func, select, update

from medsora.checkpoint import write_tiny_checkpoint
from server import batch_runner
from server.app import create_app
from server.batch_runner import BatchRunner, make_batch_runner
from server.batches.model import Batch, BatchLine
from server.batches.repository import BatchRepository
from server.checkpoints import Catalogue
from server.events.model import Event
from server.files.model import File
from server.files.store import FileStore
from server.jobs.bulk import ClaimLostError
from server.jobs.database import Database, database_now
from server.jobs.model import Job, JobStatus
from server.jobs.queue import QueueError
from server.jobs.repository import FinishedWork, JobRepository
from server.keys.limits import UsageOfDay
from server.settings import Settings

Finish = Callable[[str, int], FinishedWork]


@pytest.fixture
def settings_database(database_url: str) -> SecretStr:
    """All of this is done on both databases."""
    return SecretStr(database_url)


class SilentQueue:
    """Takes every id, or none."""

    def __init__(self) -> None:
        self.published: list[str] = []
        self.is_down = False

    def publish(self, job_id: str, attempt: int) -> None:
        """Remember an id."""
        if self.is_down:
            raise QueueError("down")
        self.published.append(job_id)

    def publish_hints(self, jobs: Sequence[tuple[str, int]]) -> None:
        """Remember all ids."""
        for job_id, attempt in jobs:
            self.publish(job_id, attempt)


class Bench:
    """A client, a runner and hands that do what workers do, on one data folder."""

    def __init__(self, client: TestClient, settings: Settings, work: Finish) -> None:
        self.client, self.settings, self._work = client, settings, work
        self.database = Database(settings.database_address)
        self.jobs = JobRepository(self.database, lease_s=60.0, max_attempts=3)
        self.queue = SilentQueue()
        self.runner = self.new_runner()

    def new_runner(self, **changes: Any) -> BatchRunner:
        """A runner as another process would have one."""
        settings = self.settings.model_copy(update={"max_queued_jobs": 100, **changes})
        return make_batch_runner(
            settings,
            database=self.database,
            catalogue=Catalogue.load(settings.checkpoints),
            queue=self.queue,  # type: ignore[arg-type]
        )

    def upload(self, content: bytes) -> str:
        """Upload a file; returns its id."""
        answer = self.client.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def create(self, content: bytes | Sequence[Any], **fields: Any) -> str:
        """Upload lines and ask for a batch of them; returns its id."""
        if not isinstance(content, bytes):
            content = b"".join(json.dumps(line).encode() + b"\n" for line in content)
        body = {"endpoint": "/v1/videos", "completion_window": "24h", **fields}
        answer = self.client.post("/v1/batches", json={"input_file_id": self.upload(content), **body})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def batch(self, batch_id: str) -> Any:
        """The batch as a client sees it."""
        return self.client.get(f"/v1/batches/{batch_id}").json()

    def look(self) -> None:
        """Let the runner look until there is nothing to do at once."""
        for _ in range(100):
            if not self.runner.look():
                return
        raise AssertionError("the runner never rests")

    def waiting(self) -> list[str]:
        """Ids of the jobs that wait, oldest first."""
        with self.database.read() as connection:
            return list(connection.scalars(select(Job.id).where(Job.status == JobStatus.QUEUED).order_by(Job.seq)))

    def count_jobs(self) -> int:
        """Number of all jobs."""
        with self.database.read() as connection:
            return connection.scalar(select(func.count()).select_from(Job)) or 0

    def make(self, job_id: str) -> None:
        """Make the video of a job."""
        claim = self.jobs.claim(job_id, worker="w")
        assert claim is not None
        assert self.jobs.succeed(job_id, claim.token, self._work(job_id, claim.token))

    def fail(self, job_id: str) -> None:
        """Let a job fail."""
        claim = self.jobs.claim(job_id, worker="w")
        assert claim is not None
        assert self.jobs.fail(job_id, claim.token, code="out_of_memory", message="too big")

    def work_off(self, batch_id: str) -> Any:
        """Make every video of a batch; returns it at its end."""
        for _ in range(200):
            self.look()
            if self.batch(batch_id)["status"] in ("completed", "failed", "expired", "cancelled"):
                return self.batch(batch_id)
            for job_id in self.waiting():
                self.make(job_id)
        raise AssertionError(self.batch(batch_id))

    def change(self, table: Any, **values: Any) -> None:
        """Change a column of all rows."""
        with self.database.write() as connection:
            connection.execute(update(table).values(**values))

    def lines(self, file_id: str | None) -> list[Any]:
        """Lines of an output or error file."""
        if file_id is None:
            return []
        text = self.client.get(f"/v1/files/{file_id}/content").text
        assert text.endswith("\n")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def bench(client: TestClient, settings: Settings, finished_work: Finish) -> Iterator[Bench]:
    """Everything that a batch needs."""
    made = Bench(client, settings, finished_work)
    yield made
    made.database.close()


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    """A line that can be done."""
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/videos",
        "body": {"prompt": "covid lung", "num_inference_steps": 4, **body},
    }


def test_from_file_to_files(bench: Bench) -> None:
    lines = [line("a", seed=7), line("b", prompt="a cat"), line("c", seed=9, model="tiny"), line("d", seed=-1)]
    batch_id = bench.create(lines, metadata={"k": "v"})
    bench.look()
    batch = bench.batch(batch_id)
    assert (batch["status"], batch["request_counts"]) == ("in_progress", {"total": 4, "completed": 0, "failed": 2})
    first, second = bench.waiting()
    assert bench.queue.published == [first, second]
    bench.make(second)
    bench.look()
    assert bench.batch(batch_id)["request_counts"] == {"total": 4, "completed": 1, "failed": 2}
    bench.make(first)
    batch = bench.work_off(batch_id)
    assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 4, "completed": 2, "failed": 2})
    assert batch["created_at"] <= batch["in_progress_at"] <= batch["finalizing_at"] <= batch["completed_at"]
    assert (batch["errors"], batch["metadata"]) == (None, {"k": "v"})
    output = bench.lines(batch["output_file_id"])
    assert [(one["custom_id"], one["error"], one["response"]["status_code"]) for one in output] == [
        ("a", None, 200),
        ("c", None, 200),
    ]
    video = output[0]["response"]["body"]
    url = video.pop("content_url")
    assert video == bench.client.get(f"/v1/videos/{first}").json(), "a line's answer and a request's answer differ"
    assert url == f"/v1/videos/{first}/content"
    errors = bench.lines(batch["error_file_id"])
    assert [(one["custom_id"], one["error"], one["response"]["status_code"]) for one in errors] == [
        ("b", None, 400),
        ("d", None, 400),
    ]
    refused = bench.client.post("/v1/videos", json=lines[1]["body"]).json()
    assert errors[0]["response"]["body"] == refused, "a line and a request are refused differently"
    ids = [one["id"] for one in output + errors] + [one["response"]["request_id"] for one in output + errors]
    assert len(set(ids)) == 8
    for file_id, name in ((batch["output_file_id"], "output"), (batch["error_file_id"], "error")):
        file = bench.client.get(f"/v1/files/{file_id}").json()
        assert (file["purpose"], file["filename"]) == ("batch_output", f"{batch_id}_{name}.jsonl")
    with bench.database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(BatchLine)) == 0


def test_lines_may_begin_with_a_picture(settings: Settings, finished_work: Finish, tmp_path: Path) -> None:
    def png(size: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (size, size)).save(buffer, "PNG")
        return buffer.getvalue()

    checkpoint = write_tiny_checkpoint(tmp_path / "tiny", max_frames=32)
    changed = settings.model_copy(update={"checkpoints": (str(checkpoint),)})
    with TestClient(create_app(changed)) as client:
        bench = Bench(client, changed, finished_work)
        answer = client.post("/v1/files", files={"file": ("a.png", png(32))}, data={"purpose": "vision"})
        reference = {"file_id": answer.json()["id"]}
        small = "data:image/png;base64," + base64.b64encode(png(16)).decode()
        lines = [
            line("file", input_reference=reference),
            line("none", input_reference={"file_id": "file-" + "0" * 32}),
            line("small", input_reference={"image_url": small}),
        ]
        batch = bench.work_off(bench.create(lines))
        (made,) = bench.lines(batch["output_file_id"])
        job = bench.jobs.get(made["response"]["body"]["id"])
        assert job is not None
        assert (made["custom_id"], job.prefix_frames, job.source_kind) == ("file", 1, "reference")
        errors = bench.lines(batch["error_file_id"])
        assert [one["custom_id"] for one in errors] == ["none", "small"]
        for number, one in enumerate(errors, start=1):
            alone = client.post("/v1/videos", json=lines[number]["body"])
            assert (one["response"]["status_code"], one["response"]["body"]) == (alone.status_code, alone.json())
        bench.database.close()


def test_lines_that_wait_for_a_quota_leave_nothing_behind(
    settings: Settings, finished_work: Finish, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    picture = {"image_url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny", max_frames=32)
    quota = {"checkpoints": (str(checkpoint),), "tenant_clips_per_day": 2, "batch_interval_s": 0.01}
    changed = settings.model_copy(update=quota)
    with TestClient(create_app(changed)) as client:
        bench = Bench(client, changed, finished_work)
        batch_id = bench.create([line(name, input_reference=picture) for name in "abcd"])
        for _ in range(3):
            bench.look()
            time.sleep(0.06)
        assert len(bench.waiting()) == 2
        kept = [path for path in changed.sources_dir.rglob("*") if path.is_file()]
        assert len(kept) == 2
        with bench.database.write() as connection:
            connection.execute(delete(UsageOfDay))
        time.sleep(0.06)
        assert bench.work_off(batch_id)["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
        bench.database.close()


def test_what_becomes_of_a_batch_is_told(bench: Bench) -> None:
    ends = {
        "completed": bench.create([line("a"), line("b", prompt="a cat")]),
        "failed": bench.create(b"nonsense"),
        "cancelled": bench.create([line("c")]),
    }
    bench.client.post(f"/v1/batches/{ends['cancelled']}/cancel")
    bench.work_off(ends["completed"])
    begin = {"completed": ["in_progress", "progress", "finalizing"], "failed": [], "cancelled": ["cancelling"]}
    for end, batch_id in ends.items():
        query = select(Event.kind, Event.data, Event.tenant).where(Event.subject == batch_id).order_by(Event.seq)
        with bench.database.read() as connection:
            events = connection.execute(query).all()
        assert [event.kind for event in events] == [f"batch.{what}" for what in ["validating", *begin[end], end]]
        assert {event.tenant for event in events} == {"default"}
        last = events[-1].data
        assert (last["id"], last["status"]) == (batch_id, end)
        assert last["request_counts"] == bench.batch(batch_id)["request_counts"]


def test_lines_carry_all_that_a_request_may(bench: Bench) -> None:
    body = {"extra_params": {"num_inference_steps": 6}, "size": "32x32", "seconds": 2, "lora": None, "n": 1, "fps": 8}
    batch_id = bench.create([{**line("a"), "body": {"prompt": "covid lung", "seed": 5, **body}}])
    (video,) = [one["response"]["body"] for one in bench.lines(bench.work_off(batch_id)["output_file_id"])]
    assert (video["seed"], video["num_inference_steps"], video["size"], video["seconds"]) == (5, 6, "32x32", "2")


def test_without_success_there_is_no_output_file(bench: Bench) -> None:
    batch_id = bench.create([line("a"), line("b"), line("c")])
    bench.look()
    failed, deleted, cancelled = bench.waiting()
    bench.fail(failed)
    bench.client.delete(f"/v1/videos/{deleted}")
    bench.jobs.request_cancel(cancelled)
    batch = bench.work_off(batch_id)
    assert (batch["status"], batch["output_file_id"]) == ("completed", None)
    assert batch["request_counts"] == {"total": 3, "completed": 0, "failed": 3}
    errors = bench.lines(batch["error_file_id"])
    assert [one["error"]["code"] for one in errors] == ["out_of_memory", "video_deleted", "cancelled"]
    assert errors[0]["response"]["body"]["status"] == "failed"
    assert [one["response"] for one in errors[1:]] == [None, None]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", [(None, "empty_file", None)]),
        (b"\n \n", [(None, "empty_file", None)]),
        (b"{\n", [(1, "invalid_json", None)]),
        (b"[]\n", [(1, "invalid_json", None)]),
        (b'\n"x"\n\xff\n', [(2, "invalid_json", None), (3, "invalid_json", None)]),
        (json.dumps(line("a")).encode() * 2, [(1, "invalid_json", None)]),
    ],
)
def test_files_that_are_no_lines(bench: Bench, content: bytes, expected: list[Any]) -> None:
    batch_id = bench.create(content)
    bench.look()
    batch = bench.batch(batch_id)
    assert (batch["status"], batch["request_counts"]["total"]) == ("failed", 0)
    assert batch["failed_at"] is not None
    assert [(one["line"], one["code"], one["param"]) for one in batch["errors"]["data"]] == expected
    assert bench.count_jobs() == 0


def test_every_problem_is_told_with_its_line(bench: Bench) -> None:
    good = line("a")
    lines = [
        good,
        {**good, "custom_id": "b", "method": "GET"},
        {**good, "custom_id": "c", "url": "/v1/images"},
        {**good, "custom_id": 4},
        {**good, "custom_id": ""},
        {**good, "custom_id": "x" * 513},
        {**good, "custom_id": "e", "body": []},
        {**good, "custom_id": "f", "priority": 1},
        {"custom_id": "g", "method": "POST", "url": "/v1/videos"},
        good,
    ]
    batch_id = bench.create(lines)
    bench.look()
    problems = bench.batch(batch_id)["errors"]["data"]
    assert [(one["line"], one["param"], one["code"]) for one in problems] == [
        (2, "method", "invalid_method"),
        (3, "url", "invalid_url"),
        (4, "custom_id", "invalid_custom_id"),
        (5, "custom_id", "invalid_custom_id"),
        (6, "custom_id", "invalid_custom_id"),
        (7, "body", "invalid_body"),
        (8, "priority", "unknown_key"),
        (9, "body", "invalid_body"),
        (10, "custom_id", "duplicate_custom_id"),
    ]
    assert "must be the endpoint of the batch, /v1/videos, got '/v1/images'" in problems[1]["message"]
    assert "'a' is that of line 1 already" in problems[-1]["message"]


def test_names_are_unique_across_portions(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "_CHECK_LINES", 3)
    batch_id = bench.create([line(str(number % 7)) for number in range(10)])
    bench.look()
    problems = bench.batch(batch_id)["errors"]["data"]
    assert [(one["line"], one["message"]) for one in problems] == [
        (8, "custom_id: '0' is that of line 1 already"),
        (9, "custom_id: '1' is that of line 2 already"),
        (10, "custom_id: '2' is that of line 3 already"),
    ]


def test_a_file_full_of_problems_is_not_read_to_its_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "_CHECK_LINES", 30)
    batch_id = bench.create(b"{\n" * 500)
    bench.look()
    problems = bench.batch(batch_id)["errors"]["data"]
    assert [one["line"] for one in problems] == [*range(1, 101), None]
    assert problems[-1]["code"] == "too_many_problems"


def test_limits_of_lines(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "MAX_LINES", 5)
    monkeypatch.setattr(batch_runner, "_CHECK_LINES", 4)
    too_many = bench.create([line(str(number)) for number in range(6)])
    enough = bench.create([line(str(number)) for number in range(5)])
    bench.runner = bench.new_runner(max_body_bytes=1024)
    too_long = bench.create([line("a"), line("b", prompt="x" * 1024), line("c")])
    bench.look()
    assert [one["code"] for one in bench.batch(too_many)["errors"]["data"]] == ["too_many_lines"]
    assert bench.batch(enough)["status"] == "in_progress"
    (problem,) = bench.batch(too_long)["errors"]["data"]
    assert (problem["code"], problem["line"]) == ("line_too_long", 2)


def test_other_requests_keep_their_place(bench: Bench) -> None:
    bench.runner = bench.new_runner(max_queued_jobs=12, batch_queued_jobs=4)
    batch_id = bench.create([line(str(number)) for number in range(10)])
    bench.look()
    assert len(bench.waiting()) == 4
    bench.make(bench.waiting()[0])
    bench.look()
    assert len(bench.waiting()) == 4
    bench.runner = bench.new_runner(max_queued_jobs=4, batch_queued_jobs=100)
    for job_id in bench.waiting()[:3]:
        bench.make(job_id)
    bench.look()
    assert len(bench.waiting()) == 2, "half of the queue is for others"
    assert bench.work_off(batch_id)["request_counts"] == {"total": 10, "completed": 10, "failed": 0}
    assert bench.count_jobs() == 10


def test_batches_that_only_wait_are_not_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = bench.create([line(str(number)) for number in range(30)])
    bench.look()

    def write(database: Database, **options: bool) -> Any:
        raise AssertionError("the database was written")

    original = Database.write
    monkeypatch.setattr(Database, "write", write)
    for _ in range(3):
        assert bench.runner.look() is False
    monkeypatch.setattr(Database, "write", original)
    bench.make(bench.waiting()[0])
    bench.look()
    assert bench.batch(batch_id)["request_counts"]["completed"] == 1


def test_what_waits_follows_the_pace(bench: Bench) -> None:
    batch_id = bench.create([line(str(number)) for number in range(60)])
    bench.look()
    assert len(bench.waiting()) == 8
    for job_id in bench.waiting():
        bench.make(job_id)
    bench.look()
    assert len(bench.waiting()) == 8
    for job_id in bench.waiting():
        bench.make(job_id)
    bench.look()
    assert len(bench.waiting()) == 16, "as many as were made just now"
    bench.change(Job, completed_at=database_now() - 60)
    for job_id in bench.waiting():
        bench.jobs.request_cancel(job_id)
    bench.look()
    assert len(bench.waiting()) == 8, "none was made lately"
    assert bench.work_off(batch_id)["request_counts"]["total"] == 60


def test_batches_share_the_places(bench: Bench) -> None:
    bench.runner = bench.new_runner(batch_queued_jobs=6)
    ids = [bench.create([line(f"{name}{number}") for number in range(20)]) for name in "ab"]
    bench.look()
    with bench.database.read() as connection:
        query = select(BatchLine.batch_seq, func.count()).where(BatchLine.job_id.is_not(None))
        shares = [tuple(row) for row in connection.execute(query.group_by(BatchLine.batch_seq))]
    assert len(bench.waiting()) == 6
    assert all(count >= 1 for _, count in shares)
    assert len(shares) == 2
    for batch_id in ids:
        assert bench.work_off(batch_id)["status"] == "completed"


def test_metrics_tell_what_batches_are_still_to_give(bench: Bench) -> None:
    def told() -> str:
        text = bench.client.get("/metrics").text
        return next(
            line for line in text.splitlines() if line.startswith('medsora_num_bulk_clips_unfinished{kind="batch"')
        )

    assert told().endswith(" 0.0")
    bench.runner = bench.new_runner(batch_queued_jobs=3)
    bench.create([line(str(number)) for number in range(9)])
    other = bench.create([line("a")])
    bench.look()
    assert told().endswith(" 10.0"), "with those that have no job yet"
    made, failed, *_ = bench.waiting()
    bench.make(made)
    bench.fail(failed)
    bench.look()
    assert told().endswith(" 8.0")
    bench.client.post(f"/v1/batches/{other}/cancel")
    assert told().endswith(" 7.0")


def test_cancelled_before_it_began(bench: Bench) -> None:
    batch_id = bench.create([line("a")])
    bench.client.post(f"/v1/batches/{batch_id}/cancel")
    batch = bench.work_off(batch_id)
    assert batch["status"] == "cancelled"
    assert batch["cancelling_at"] <= batch["cancelled_at"]
    assert (batch["output_file_id"], batch["error_file_id"], batch["request_counts"]["total"]) == (None, None, 0)
    assert bench.count_jobs() == 0


def test_cancelled_on_the_way(bench: Bench) -> None:
    bench.runner = bench.new_runner(batch_queued_jobs=3)
    batch_id = bench.create([line(name) for name in "abcde"])
    bench.look()
    done, running, waiting = bench.waiting()
    bench.make(done)
    claim = bench.jobs.claim(running, worker="w")
    assert claim is not None
    bench.client.post(f"/v1/batches/{batch_id}/cancel")
    bench.look()
    assert bench.batch(batch_id)["status"] == "cancelling", "one is still running"
    assert bench.client.get(f"/v1/videos/{waiting}").json()["error"]["code"] == "cancelled"
    assert bench.jobs.renew(running, claim.token, steps_done=1) is True
    assert bench.jobs.finish_cancel(running, claim.token)
    bench.look()
    batch = bench.batch(batch_id)
    assert (batch["status"], batch["request_counts"]) == ("cancelled", {"total": 5, "completed": 1, "failed": 4})
    assert [one["custom_id"] for one in bench.lines(batch["output_file_id"])] == ["a"]
    errors = bench.lines(batch["error_file_id"])
    assert [(one["custom_id"], one["error"]["code"]) for one in errors] == [(n, "batch_cancelled") for n in "bcde"]
    assert bench.count_jobs() == 3


def test_expired_on_the_way(bench: Bench) -> None:
    bench.runner = bench.new_runner(batch_queued_jobs=2)
    batch_id = bench.create([line(name) for name in "abc"], completion_window="1h")
    bench.look()
    done, waiting = bench.waiting()
    bench.make(done)
    bench.change(Batch, expires_at=database_now() - 1)
    batch = bench.work_off(batch_id)
    assert (batch["status"], batch["request_counts"]) == ("expired", {"total": 3, "completed": 1, "failed": 2})
    assert batch["expired_at"] is not None
    assert batch["completed_at"] is None
    assert [one["custom_id"] for one in bench.lines(batch["output_file_id"])] == ["a"]
    errors = bench.lines(batch["error_file_id"])
    assert [(one["custom_id"], one["error"]["code"]) for one in errors] == [
        ("b", "batch_expired"),
        ("c", "batch_expired"),
    ]
    job = bench.jobs.get(waiting)
    assert job is not None
    assert job.status is JobStatus.CANCELED


def test_life_of_the_output(bench: Bench) -> None:
    batch_id = bench.create([line("a")], output_expires_after={"anchor": "created_at", "seconds": 7200})
    file = bench.client.get(f"/v1/files/{bench.work_off(batch_id)['output_file_id']}").json()
    assert file["expires_at"] - file["created_at"] == 7200


def test_the_input_file_may_be_deleted_on_the_way(bench: Bench) -> None:
    bench.runner = bench.new_runner(batch_queued_jobs=1)
    batch_id = bench.create([line(name) for name in "abc"])
    bench.look()
    file_id = bench.batch(batch_id)["input_file_id"]
    bench.client.delete(f"/v1/files/{file_id}")
    bench.runner.tidy()
    assert FileStore(bench.settings.files_dir).path(file_id).exists(), "a batch still reads it"
    assert bench.work_off(batch_id)["request_counts"]["completed"] == 3
    bench.runner.tidy()
    assert not FileStore(bench.settings.files_dir).path(file_id).exists()


def test_bytes_of_files_that_are_gone_are_removed(bench: Bench) -> None:
    ids = [bench.upload(b"x") for _ in range(3)]
    store = FileStore(bench.settings.files_dir)
    bench.client.delete(f"/v1/files/{ids[0]}")
    with bench.database.write() as connection:
        connection.execute(update(File).where(File.id == ids[1]).values(expires_at=database_now() - 1))
    bench.runner.tidy()
    assert [store.path(file_id).exists() for file_id in ids] == [False, False, True]
    bench.change(File, removed_at=database_now() - 100_000)
    bench.runner.tidy()
    with bench.database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(File)) == 0


def test_files_that_no_row_names_are_removed_when_old(bench: Bench) -> None:
    kept = bench.upload(b"x")
    store = FileStore(bench.settings.files_dir)
    orphan, partial = store.path("file-" + "0" * 32), store.path(kept).with_name(f"{kept}.{'0' * 16}.part")
    for path in (orphan, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"y")
    assert bench.runner.remove_orphans(older_than_s=60.0) == 0
    assert bench.runner.remove_orphans(older_than_s=-1.0) == 2
    assert [path.exists() for path in (orphan, partial, store.path(kept))] == [False, False, True]


def test_a_broker_that_is_down_loses_nothing(bench: Bench) -> None:
    bench.queue.is_down = True
    bench.create([line("a"), line("b")])
    bench.look()
    assert [job_id for job_id, _ in bench.jobs.unpublished(grace_s=0.0, limit=10)] == bench.waiting()
    assert len(bench.waiting()) == 2


class Killed(BaseException):
    """Stands for the end of a process: nothing catches it."""


@pytest.mark.parametrize("at", range(40))
def test_killed_before_or_after_any_transaction(bench: Bench, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies at its ``at``-th transaction, just before or just after it is durable, is replaced."""
    monkeypatch.setattr(batch_runner, "_CHECK_LINES", 3)
    monkeypatch.setattr(batch_runner, "_SUBMIT_LINES", 2)
    monkeypatch.setattr(batch_runner, "_RESULT_LINES", 2)
    lines = [line(str(number), **({"prompt": "a cat"} if number == 3 else {})) for number in range(7)]
    batch_id = bench.create(lines)
    original, count = Database.write, 0

    def write(database: Database, **options: bool) -> Any:
        nonlocal count
        count += 1
        if count == at // 2 + 1:
            monkeypatch.setattr(Database, "write", original)
            if at % 2:
                return after(original(database, **options))
            raise Killed
        return original(database, **options)

    class after:  # noqa: N801 - a context manager
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __enter__(self) -> Any:
            return self._inner.__enter__()

        def __exit__(self, *error: Any) -> None:
            self._inner.__exit__(*error)
            raise Killed

    monkeypatch.setattr(Database, "write", write)

    def work_until_killed() -> None:
        for _ in range(30):
            bench.runner.look()
            for job_id in bench.waiting():
                monkeypatch.setattr(Database, "write", original)
                bench.make(job_id)
                monkeypatch.setattr(Database, "write", write)

    with pytest.raises(Killed):
        work_until_killed()
    monkeypatch.setattr(Database, "write", original)
    bench.change(Batch, lease_until=database_now() - 1)  # the lease of the dead one runs out
    bench.runner = bench.new_runner()
    batch = bench.work_off(batch_id)
    assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 7, "completed": 6, "failed": 1})
    assert bench.count_jobs() == 6
    output = bench.lines(batch["output_file_id"])
    assert [one["custom_id"] for one in output] == ["0", "1", "2", "4", "5", "6"]
    assert len({one["response"]["body"]["id"] for one in output}) == 6
    assert [one["custom_id"] for one in bench.lines(batch["error_file_id"])] == ["3"]
    bench.runner.remove_orphans(older_than_s=-1.0)
    files = [path.name for path in bench.settings.files_dir.rglob("*") if path.is_file()]
    assert len(files) == 3


def test_one_that_was_frozen_changes_nothing(bench: Bench) -> None:
    batch_id = bench.create([line("a"), line("b")])
    repository = BatchRepository(bench.database, lease_s=60.0)
    (seq,) = repository.with_work(has_room=True)
    frozen = repository.claim(seq)
    assert frozen is not None
    assert repository.claim(seq) is None, "it is held"
    bench.change(Batch, lease_until=database_now() - 1)
    bench.look()
    jobs = bench.count_jobs()
    for change in (
        lambda: repository.renew(frozen),
        lambda: repository.submit(frozen, []),
        lambda: repository.end_validation(frozen),
        lambda: repository.add_checked(frozen, [], [], checked_lines=0, checked_bytes=0),
        lambda: repository.begin_end(frozen, expired=True),
    ):
        with pytest.raises(ClaimLostError):
            change()
    repository.release(frozen)
    assert bench.count_jobs() == jobs == 2
    assert bench.work_off(batch_id)["request_counts"]["completed"] == 2


def test_several_runners_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "_CHECK_LINES", 20)
    monkeypatch.setattr(batch_runner, "_SUBMIT_LINES", 5)
    limits = {"batch_queued_jobs": 1000, "max_queued_jobs": 10_000}
    ids = [bench.create([line(f"{name}{number}") for number in range(60)]) for name in "abc"]
    stop = threading.Event()
    runners = [bench.new_runner(batch_interval_s=0.01, **limits) for _ in range(4)]
    threads = [threading.Thread(target=runner.run, args=(stop,)) for runner in runners]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2000):
            for job_id in bench.waiting():
                bench.make(job_id)
            if all(bench.batch(batch_id)["status"] == "completed" for batch_id in ids):
                break
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert bench.count_jobs() == 180
    for batch_id in ids:
        batch = bench.batch(batch_id)
        assert batch["request_counts"] == {"total": 60, "completed": 60, "failed": 0}
        output = bench.lines(batch["output_file_id"])
        assert Counter(one["custom_id"] for one in output) == Counter({one["custom_id"]: 1 for one in output})


def test_bytes_that_vanished(bench: Bench) -> None:
    batch_id = bench.create([line("a")])
    FileStore(bench.settings.files_dir).path(bench.batch(batch_id)["input_file_id"]).unlink()
    bench.look()
    assert [one["code"] for one in bench.batch(batch_id)["errors"]["data"]] == ["input_file_missing"]


def test_a_look_that_fails_does_not_end_the_runner(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        if looks == 3:
            stop.set()
        raise ZeroDivisionError

    runner = bench.new_runner(batch_interval_s=0.001)
    monkeypatch.setattr(runner, "look", look)
    runner.run(stop)
    assert looks == 3


def test_a_missing_disk_is_waited_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = bench.create([line("a")])
    bench.look()
    bench.make(bench.waiting()[0])
    bench.settings.files_dir.rename(bench.settings.data_dir / "away")
    bench.settings.files_dir.write_text("in the way")
    assert bench.runner.look() is True, "the lines are settled"
    assert bench.runner.look() is False
    assert bench.batch(batch_id)["status"] == "finalizing"
    bench.settings.files_dir.unlink()
    Path(bench.settings.data_dir / "away").rename(bench.settings.files_dir)
    assert bench.work_off(batch_id)["status"] == "completed"
