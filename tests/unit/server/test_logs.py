"""Lines of the log: form, what they belong to, and what never stands in them."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextvars import copy_context

import pytest
from fastapi.testclient import TestClient

from server.jobs.database import Database
from server.jobs.repository import JobRepository
from server.logs import JsonFormatter, TextFormatter, bound, current, note, without_secrets
from server.reaper import Reaper

KEY = "medsora_0123456789abcdef_" + "ab" * 32


class Lines(logging.Handler):
    """Keeps what a formatter makes of each record."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def json(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.lines]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines(JsonFormatter("api"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel("DEBUG")
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


def test_a_line_of_json(lines: Lines) -> None:
    with bound(request_id="req_1", job_id=None):
        logging.getLogger("server.x").warning("a %s\nin two lines", "thing", extra={"status": 500})
    (line,) = lines.json()
    assert str(line.pop("time")).endswith("+00:00")
    assert isinstance(line.pop("process"), int)
    assert line == {
        "level": "warning",
        "message": "a thing\nin two lines",
        "logger": "server.x",
        "part": "api",
        "request_id": "req_1",
        "status": 500,
    }
    assert "\n" not in lines.lines[0]


def test_an_exception_stays_in_its_line(lines: Lines) -> None:
    try:
        raise ValueError(f"refused {KEY}")
    except ValueError:
        logging.getLogger("server.x").exception("failed")
    (line,) = lines.json()
    assert "ValueError: refused medsora_0123456789abcdef_***" in str(line["exception"])


def test_a_line_of_text() -> None:
    record = logging.LogRecord("server.x", logging.INFO, "x.py", 1, "a %s", ("thing",), None)
    with bound(request_id="req_1", tenant="a"):
        text = TextFormatter().format(record)
    assert text.endswith("INFO " + f"{record.process} server.x: a thing [request_id=req_1 tenant=a]")


def test_what_is_noted_in_a_thread_of_a_request_belongs_to_the_request() -> None:
    with bound(request_id="req_1"):
        context = copy_context()
        thread = threading.Thread(target=lambda: context.run(note, tenant="a"))
        thread.start()
        thread.join()
        with bound(job_id="video_1"):
            assert current() == {"request_id": "req_1", "tenant": "a", "job_id": "video_1"}
        assert current() == {"request_id": "req_1", "tenant": "a"}
    assert current() == {}
    note(tenant="nobody's")
    assert current() == {}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"Authorization: Bearer {KEY}", "Authorization: Bearer ***"),
        (f"key {KEY}.", "key medsora_0123456789abcdef_***."),
        ("secret whsec_c2VjcmV0/+==", "secret whsec_***"),
        ("redis://:pass@host:6379/0 is down", "redis://***@host:6379/0 is down"),
        ("postgresql+psycopg://u:p%40ss@db/x", "postgresql+psycopg://***@db/x"),
        ("https://example.com/a@b", "https://example.com/a@b"),
        ("violates\nDETAIL:  Failing row contains (covid lung).\nmore", "violates\nDETAIL: ***\nmore"),
    ],
)
def test_secrets_are_struck_out(text: str, clean: str) -> None:
    assert without_secrets(text) == clean


def test_errors_of_the_database_do_not_show_what_was_written(database: Database) -> None:
    with pytest.raises(Exception, match="hide_parameters") as error, database.write() as connection:
        connection.exec_driver_sql("insert into nothing values (?)", ("canary",))
    assert "canary" not in str(error.value)


def test_lines_of_a_request_carry_its_id_tenant_and_job(client: TestClient, lines: Lines) -> None:
    answer = client.post("/v1/videos", json={"prompt": "covid lung"})
    (line,) = [line for line in lines.json() if line["message"] == "answered"]
    assert line["request_id"] == answer.headers["x-request-id"]
    assert line["job_id"] == answer.json()["id"]
    assert (line["tenant"], line["method"], line["route"], line["status"]) == ("default", "POST", "/v1/videos", 200)
    assert line["level"] == "info"
    job = client.app.state.services.repository.get(answer.json()["id"])  # type: ignore[attr-defined]
    assert job.request_id == answer.headers["x-request-id"]
    client.get(f"/v1/videos/{job.id}")
    seen = lines.json()[-1]
    assert (seen["message"], seen["level"], seen["job_id"]) == ("answered", "debug", job.id)
    client.get("/v1/videos/canary")
    assert "canary" not in lines.lines[-1]
    assert lines.json()[-1]["level"] == "info"


def test_the_reaper_names_the_job_and_the_request(
    client: TestClient, lines: Lines, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = client.app.state.services  # type: ignore[attr-defined]
    answer = client.post("/v1/videos", json={"prompt": "covid lung"})
    repository = JobRepository(services.database, lease_s=-1.0, max_attempts=3)
    assert repository.claim(answer.json()["id"], worker="w") is not None
    reaper = Reaper.__new__(Reaper)
    monkeypatch.setattr(reaper, "_repository", repository, raising=False)
    reaper._settle_expired()
    line = lines.json()[-1]
    assert "ran out in attempt 1: it is queued now" in str(line["message"])
    assert line["job_id"] == answer.json()["id"]
    assert line["request_id"] == answer.headers["x-request-id"]
    assert line["tenant"] == "default"


def test_errors_that_nobody_has_caught_are_lines_too() -> None:
    program = (
        "import threading, warnings; from server.logs import configure_logging\n"
        "configure_logging('info', 'json', part='reaper')\n"
        "warnings.warn('beware')\n"
        "thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()\n"
        "raise ValueError('here')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["warning", "critical", "critical"]
    assert "ZeroDivisionError" in lines[1]["exception"]
    assert "ValueError: here" in lines[2]["exception"]
    assert {line["part"] for line in lines} == {"reaper"}
    assert done.returncode == 1
