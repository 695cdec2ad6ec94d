"""The doctor: finds what is broken, says what to do, and never breaks itself."""

import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from typer.testing import CliRunner

from server import doctor
from server.cli import app
from server.doctor import Finding, State, examine
from server.embedded import find_redis_server
from server.jobs.database import Database, database_now
from server.jobs.model import Job
from server.jobs.repository import JobRepository
from server.jobs.schema import migrate
from server.keys.model import Scope
from server.keys.repository import KeyRepository
from server.settings import Settings


@pytest.fixture
def look(tmp_path: Path, tiny_checkpoint: Path) -> Callable[..., dict[str, Finding]]:
    """Examine a server with these settings; returns what was found by part."""

    def examine_with(**changes: Any) -> dict[str, Finding]:
        fields = {"data_dir": tmp_path, "checkpoints": (str(tiny_checkpoint),), "min_free_bytes": 0, **changes}
        findings = examine(Settings(**fields))
        for finding in findings:
            is_wrong = finding.state in (State.WARNING, State.FAILING)
            assert not is_wrong or finding.advice, f"no advice: {finding}"
        return {finding.part: finding for finding in findings}

    return examine_with


@pytest.fixture
def migrated(tmp_path: Path) -> Iterator[Database]:
    """The database of the server that is looked at."""
    database = Database(f"sqlite:///{tmp_path / 'medsora.db'}")
    migrate(database)
    yield database
    database.close()


def test_a_machine_before_its_first_start(look: Callable[..., dict[str, Finding]], tmp_path: Path) -> None:
    found = look()
    assert {finding.state for finding in found.values()} == {State.OK}
    assert "first start" in found["database"].found
    assert list(tmp_path.iterdir()) == [], "a look changes nothing"


def test_nobody_works(look: Callable[..., dict[str, Finding]], migrated: Database) -> None:
    found = look()
    assert (found["database"].state, found["clock"].state) == (State.OK, State.OK)
    assert (found["workers"].state, found["reaper"].state) == (State.WARNING, State.OK)
    assert "medsora-server worker" in str(found["workers"].advice)


def test_a_job_of_a_lost_worker_that_nobody_gives_back(
    look: Callable[..., dict[str, Finding]], migrated: Database, job_values: dict[str, Any]
) -> None:
    repository = JobRepository(migrated, lease_s=60.0, max_attempts=3)
    repository.add(job_values, max_queued=10)
    (claim,) = repository.claim_next(worker="w", most=lambda job: 1)
    assert look()["reaper"].state is State.OK
    with migrated.write() as connection:
        connection.execute(update(Job).where(Job.id == claim.job.id).values(lease_until=database_now() - 100))
    found = look()["reaper"]
    assert found.state is State.FAILING
    assert "medsora-server reaper" in str(found.advice)


@pytest.mark.parametrize(
    ("revision", "state", "advice"), [("9999", State.FAILING, "newer version"), ("0003", State.WARNING, "backup")]
)
def test_a_schema_of_another_version(
    look: Callable[..., dict[str, Finding]], migrated: Database, revision: str, state: State, advice: str
) -> None:
    known = {"0003": _older_revision()}
    with migrated.write() as connection:
        connection.exec_driver_sql(f"update alembic_version set version_num = '{known.get(revision, revision)}'")
    found = look()
    assert found["database"].state is state
    assert advice in str(found["database"].advice)


def _older_revision() -> str:
    from alembic.script import ScriptDirectory

    from server.jobs import migrations

    scripts = ScriptDirectory(str(Path(str(migrations.__file__)).parent))
    return [script.revision for script in scripts.walk_revisions()][2]


def test_a_damaged_database(look: Callable[..., dict[str, Finding]], tmp_path: Path) -> None:
    (tmp_path / "medsora.db").write_bytes(b"this is no database" * 1000)
    found = look()["database"]
    assert found.state is State.FAILING
    assert "backup" in str(found.advice)


def test_a_folder_that_may_not_be_looked_into(
    look: Callable[..., dict[str, Finding]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any other user than the owner meets it; root is asked nothing."""
    exists = Path.exists

    def refuse(path: Path, **options: bool) -> bool:
        if path.name == "medsora.db":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", refuse)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = look()["database"]
    assert found.state is State.FAILING
    assert found.found == f"{tmp_path / 'medsora.db'} cannot be read and written"
    assert "the right to read and write" in str(found.advice)


def test_a_database_that_is_held(
    look: Callable[..., dict[str, Finding]], migrated: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_CONNECT_S", 0.2)
    migrated.close()
    holder = sqlite3.connect(tmp_path / "medsora.db", isolation_level=None)
    holder.execute("PRAGMA journal_mode=DELETE")
    holder.execute("BEGIN EXCLUSIVE")
    try:
        found = look()["database"]
    finally:
        holder.close()
    assert found.state is State.FAILING
    assert "Another program" in str(found.advice)


def test_a_postgresql_that_is_down(look: Callable[..., dict[str, Finding]]) -> None:
    pytest.importorskip("psycopg")
    found = look(database_url="postgresql+psycopg://user:secret@127.0.0.1:1/medsora")
    assert found["database"].state is State.FAILING
    assert "MEDSORA_DATABASE_URL" in str(found["database"].advice)
    assert "secret" not in str(found)


def test_clocks_that_differ(
    look: Callable[..., dict[str, Finding]], migrated: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    monkeypatch.setattr(doctor.time, "time", lambda: now() - 90)
    found = look()["clock"]
    assert found.state is State.WARNING
    assert "90.0 s ahead of" in found.found
    assert "NTP" in str(found.advice)


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A Redis with a password, that drops messages when memory is short."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--requirepass", "right", "--maxmemory-policy", "allkeys-lru", "--save", ""]
    process = subprocess.Popen(
        [find_redis_server(), *options],
        cwd=tmp_path_factory.mktemp("redis"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    yield port
    process.terminate()
    process.wait(10)


def test_redis_with_the_right_password(look: Callable[..., dict[str, Finding]], redis_port: int) -> None:
    found = look(redis_url=f"redis://:right@127.0.0.1:{redis_port}/0")
    assert found["redis"].state is State.OK
    assert found["redis memory"].state is State.WARNING
    assert "noeviction" in str(found["redis memory"].advice)


@pytest.mark.parametrize("login", ["", ":wrong@"])
def test_redis_with_a_wrong_password(look: Callable[..., dict[str, Finding]], redis_port: int, login: str) -> None:
    found = look(redis_url=f"redis://{login}127.0.0.1:{redis_port}/0")["redis"]
    assert found.state is State.FAILING
    assert "password in MEDSORA_REDIS_URL" in str(found.advice)


def test_redis_that_is_down(look: Callable[..., dict[str, Finding]]) -> None:
    found = look(redis_url="redis://:secret@127.0.0.1:1/0")["redis"]
    assert found.state is State.FAILING
    assert "Start Redis" in str(found.advice)
    assert "secret" not in str(found)


def test_no_redis_to_start(look: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> str:
        raise doctor.ServeError("no redis-server found: install it")

    monkeypatch.setattr(doctor, "find_redis_server", find)
    assert look()["redis"].state is State.FAILING


def test_a_full_disk(look: Callable[..., dict[str, Finding]], tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    found = look(min_free_bytes=2 * free)["disk"]
    assert found.state is State.FAILING
    assert "MEDSORA_MIN_FREE_BYTES" in str(found.advice)
    assert look(min_free_bytes=free // 2)["disk"].state is State.WARNING


def test_a_folder_that_is_none(look: Callable[..., dict[str, Finding]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    found = look(data_dir=tmp_path / "file" / "data")["disk"]
    assert found.state is State.FAILING
    assert "MEDSORA_DATA_DIR" in str(found.advice)


def test_a_bucket_that_is_down(look: Callable[..., dict[str, Finding]]) -> None:
    bucket = {"storage_url": "s3://bucket", "s3_endpoint_url": "http://127.0.0.1:1", "s3_region": "x"}
    found = look(**bucket, s3_access_key_id="a", s3_secret_access_key="b")["storage"]
    assert found.state is State.FAILING
    assert "MEDSORA_S3_" in str(found.advice)


def test_a_damaged_checkpoint(look: Callable[..., dict[str, Finding]], tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    weights = broken / "denoiser.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = look(checkpoints=(str(broken), str(tmp_path / "none")))
    assert found["checkpoint broken"].state is State.FAILING
    assert "denoiser.safetensors" in found["checkpoint broken"].found
    assert found["checkpoint none"].state is State.FAILING


def test_no_gpu_where_one_is_asked_for(
    look: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from medsora.ops import backends

    backends.kernels_problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = look(device="cuda", backend="mamba_ssm")
    assert found["device"].state is State.FAILING
    assert found["kernels"].state is State.FAILING
    assert "MEDSORA_BACKEND=auto" in str(found["kernels"].advice)
    backends.kernels_problem.cache_clear()


def test_no_torch(look: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    found = look()["device"]
    assert found.state is State.SKIPPED
    assert "medsora[worker]" in str(found.advice)


def test_who_may_come_in(look: Callable[..., dict[str, Finding]], tmp_path: Path) -> None:
    assert look(keys="off", host="127.0.0.1")["access"].state is State.OK
    assert "MEDSORA_KEYS=required" in str(look(keys="off", host="0.0.0.0")["access"].advice)
    assert "keys create" in str(look(host="0.0.0.0")["access"].advice)
    database = Database(f"sqlite:///{tmp_path / 'medsora.db'}")
    migrate(database)
    KeyRepository(database).create(tenant="t", name="n", scopes=frozenset(Scope), expires_after_s=None)
    database.close()
    assert look(host="0.0.0.0")["access"].state is State.OK


def test_a_check_that_breaks_does_not_hide_the_others(
    look: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(settings: Settings) -> Iterator[Finding]:
        raise RuntimeError("bug")

    monkeypatch.setitem(doctor._CHECKS, "disk", broken)
    found = look()
    assert found["disk"].state is State.FAILING
    assert found["access"].state is State.OK


def test_the_command(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSORA_CHECKPOINTS", str(tiny_checkpoint))
    monkeypatch.setenv("MEDSORA_DATA_DIR", str(tmp_path))
    runner = CliRunner()
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 0
    assert "ok       database:" in done.stdout
    monkeypatch.setenv("MEDSORA_HOST", "0.0.0.0")
    assert runner.invoke(app, ["doctor"]).exit_code == 0, "warnings alone"
    assert runner.invoke(app, ["doctor", "--strict"]).exit_code == 1
    monkeypatch.setenv("MEDSORA_CHECKPOINTS", str(tmp_path / "none"))
    done = runner.invoke(app, ["doctor", "--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["state"]) == (1, "failing")
    assert {"part", "state", "found", "advice"} == set(told["findings"][0])
    monkeypatch.setenv("MEDSORA_PROT", "1")
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "MEDSORA_PORT" in done.stdout, "settings that do not do are a finding, too"


def test_it_runs_without_torch_in_the_process() -> None:
    code = "import sys, server.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
