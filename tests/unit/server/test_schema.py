"""The schema: equal to the tables, reached from every version; Alembic is loaded only by who changes it."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import (
    JSON,
    Boolean,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    insert,
    inspect,
    select,
    text,
)

from server.jobs import migrations
from server.jobs.database import Database
from server.jobs.measures import JOB_MEASURES
from server.jobs.model import Base
from server.jobs.repository import FinishedWork, JobRepository
from server.jobs.schema import SchemaPosition, _known_revisions, migrate, schema_position
from server.jobs.workers import WorkerRegistry
from server.measures import read_measures


def alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return config


def alembic_versions() -> list[str]:
    """Revisions of all scripts as Alembic finds them, the oldest first."""
    return [script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()][::-1]


def test_migrations_make_exactly_the_tables(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_rows_of_every_version_come_through_all_that_follow(empty_database_url: str) -> None:
    """From each version: rows are written into all tables that it has, and are there after every later migration."""
    database = Database(empty_database_url)
    if database.is_sqlite:
        Path(str(database.url.database)).parent.mkdir()
    config, versions = alembic_config(), alembic_versions()
    assert versions == [f"{number:04}" for number in range(1, len(versions) + 1)]
    written: dict[str, list[dict[str, Any]]] = {}
    for number, version in enumerate(versions, start=1):
        with database.write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, version)
            found = MetaData()
            found.reflect(connection)
            for table in found.sorted_tables:
                if table.name == "alembic_version":
                    continue
                for row in written.get(table.name, []):
                    known = [column == row[column.name] for column in table.primary_key]
                    kept = connection.execute(select(table).where(*known)).one()._mapping
                    lost = {name: value for name, value in row.items() if kept.get(name, value) != value}
                    assert not lost, f"{version} changes {table.name}"
                row = _row_of(table, number)
                connection.execute(insert(table).values(row))
                written.setdefault(table.name, []).append(row)
    migrate(database)
    with database.read() as connection:
        for table in Base.metadata.sorted_tables:  # all of them can be read as they are now
            rows = connection.execute(select(table)).all()
            assert len(rows) >= len(written[table.name]), table.name
        assert len(written["jobs"]) == len(versions)
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    database.close()


def _row_of(table: Table, number: int) -> dict[str, Any]:
    """A row that differs from those of other numbers wherever it may have to."""
    row: dict[str, Any] = {}
    for column in table.columns:
        if column.name in ("status", "state"):
            row[column.name] = {"jobs": "succeeded", "webhook_deliveries": "failed"}.get(table.name, "completed")
        elif isinstance(column.type, JSON):
            row[column.name] = {}
        elif isinstance(column.type, Boolean):
            row[column.name] = False
        elif isinstance(column.type, (Integer, Float)):
            row[column.name] = number
        elif isinstance(column.type, LargeBinary):
            row[column.name] = b"bytes"
        else:
            row[column.name] = f"{number}"[: getattr(column.type, "length", None)]
    return row


def test_an_older_database_is_brought_up_to_date(database: Database) -> None:
    config = alembic_config()
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
        connection.execute(
            text(
                "insert into worker_processes (id, started_at, seen_at, models, device, rss_bytes)"
                " values ('old', 0, :now, 'm', 'cpu', 1)"
            ),
            {"now": time.time()},
        )
    migrate(database)
    (record,) = WorkerRegistry(database, heartbeat_s=60.0).alive()
    assert (record.id, record.warm_up_s) == ("old", {})


def test_jobs_of_an_older_database_are_kept_without_stills(
    database: Database, repository: JobRepository, job_values: dict[str, Any]
) -> None:
    job = repository.add(job_values, max_queued=10)
    config = alembic_config()
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0002")
    with database.read() as connection:
        assert "remixed_from" not in {column["name"] for column in inspect(connection).get_columns("jobs")}
        assert not inspect(connection).has_table("deleted_jobs")
    migrate(database)
    kept = repository.get(job.id)
    assert kept == job
    assert kept.tenant == "default"
    assert (job.remixed_from, job.thumbnail_sha256, job.spritesheet_sha256) == (None, None, None)
    assert repository.add(job_values, max_queued=10).seq > job.seq


def test_counters_of_an_older_database_go_on_from_what_they_told(
    database: Database,
    repository: JobRepository,
    add_job: Callable[..., str],
    finished_work: Callable[[str, int], FinishedWork],
) -> None:
    done, waits = add_job(), add_job()
    for job_id in (done, done, waits):  # no more than one attempt of the first counts as told again
        repository.claim(job_id, worker="w")
        repository.hand_back(job_id, 1)
    repository.succeed(done, 2, finished_work(done, 2))
    config = alembic_config()
    deleted = {"model": "tiny", "status": "succeeded", "jobs": 3, "frames": 48, "video_s": 6.0, "redelivered": 2}
    times = dict.fromkeys(("latency_s", "queue_s", "sampling_s", "encode_s", "store_s"), 1.0)
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0016")
        table = Table("deleted_totals", MetaData(), autoload_with=connection)
        connection.execute(insert(table).values(**deleted, **times))
    migrate(database)
    found = read_measures(database, JOB_MEASURES)
    assert {labels: sums.total for labels, sums in found["medsora_requests"].items()} == {("tiny", "succeeded"): 4.0}
    assert found["medsora_frames_generated"]["tiny",].total == 64.0
    assert found["medsora_video_seconds_generated"]["tiny",].total == 8.0
    assert found["medsora_jobs_redelivered"]["tiny",].total == 3.0


def test_processes_may_migrate_at_the_same_time(empty_database_url: str) -> None:
    url = empty_database_url
    errors: list[BaseException] = []

    def run() -> None:
        database = Database(url)
        try:
            migrate(database)
        except BaseException as error:
            errors.append(error)
        finally:
            database.close()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_the_names_of_the_scripts_tell_their_revisions() -> None:
    assert _known_revisions() == alembic_versions()


def test_who_finds_the_newest_schema_loads_no_alembic(tmp_path: Path) -> None:
    code = (
        "import sys, server.app, server.reaper, server.worker.runtime\n"
        "from server.jobs.database import Database\n"
        "from server.jobs.schema import migrate\n"
        f"migrate(Database('sqlite:///{tmp_path}/jobs.db'))\n"
        "sys.exit('alembic' in sys.modules)\n"
    )
    codes = [subprocess.run([sys.executable, "-c", code], check=False).returncode for _ in range(2)]
    assert codes == [1, 0]


def test_a_newer_database_is_left_alone(database: Database) -> None:
    with database.write() as connection:
        connection.execute(text("update alembic_version set version_num = '9999'"))
    with pytest.raises(CommandError, match="9999"):
        migrate(database)
    with database.read() as connection:
        assert schema_position(connection)[0] == SchemaPosition("9999", is_newer=True)
