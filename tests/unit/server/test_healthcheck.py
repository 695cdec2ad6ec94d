"""Health checks say what is wrong, and nothing where nothing is."""

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine
from typer.testing import CliRunner

from server.cli import app
from server.healthcheck import api_problem, reaper_problem, worker_problem
from server.jobs.database import Database
from server.jobs.schema import migrate
from server.jobs.workers import WorkerRegistry
from server.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of a server with an empty database."""
    settings = Settings(data_dir=tmp_path)
    database = Database(settings.database_address)
    migrate(database)
    database.close()
    return settings


def _report(settings: Settings, host: str, problem: str | None) -> None:
    database = Database(settings.database_address)
    WorkerRegistry(database, heartbeat_s=settings.worker_heartbeat_s).report(
        f"{host}:1:ab", models=("tiny",), device="cpu", rss_bytes=1, problem=problem
    )
    database.close()


@pytest.fixture(params=[200, 503])
def listener(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """(port, status) of something that answers every request with a status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, request.param
        server.shutdown()
        thread.join()


def test_api_answers_or_not(listener: tuple[int, int]) -> None:
    port, status = listener
    problem = api_problem(Settings(host="0.0.0.0", port=port))
    assert problem == (None if status == 200 else f"127.0.0.1:{port} answers with status 503")


def test_api_that_does_not_listen() -> None:
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} does not answer" in str(api_problem(Settings(port=port)))


def test_worker_is_that_of_this_host(settings: Settings) -> None:
    here = socket.gethostname()
    assert worker_problem(settings) == f"no sampling process of {here} shows signs of life"
    _report(settings, "another-host", None)
    assert worker_problem(settings) is not None
    _report(settings, here, "still loads")
    assert worker_problem(settings) == "still loads"
    _report(settings, here, None)
    assert worker_problem(settings) is None


def test_reaper_with_nothing_left_undone(settings: Settings) -> None:
    assert reaper_problem(settings) is None


def test_a_database_that_does_not_answer_is_named(tmp_path: Path) -> None:
    create_engine(f"sqlite:///{tmp_path / 'medsora.db'}").connect().close()  # without tables
    settings = Settings(data_dir=tmp_path)
    assert worker_problem(settings) == reaper_problem(settings) == "the job database does not answer: OperationalError"


def test_command_ends_with_1_and_says_why(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSORA_DATA_DIR", str(settings.data_dir))
    result = CliRunner().invoke(app, ["health", "worker"])
    assert (result.exit_code, "signs of life" in result.output) == (1, True)
    _report(settings, socket.gethostname(), None)
    assert CliRunner().invoke(app, ["health", "worker"]).exit_code == 0
    assert CliRunner().invoke(app, ["health", "coffee"]).exit_code == 2
