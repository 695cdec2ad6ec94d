"""The database: durable, one clock, a schema that equals the tables, writers that wait for each other."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import MetaData, Table, func, insert, inspect, select, text

from server.jobs import migrations
from server.jobs.database import Database, database_now, migrate
from server.jobs.measures import JOB_MEASURES
from server.jobs.model import Base, WorkerProcess
from server.jobs.repository import FinishedWork, JobRepository
from server.jobs.workers import WorkerRegistry
from server.measures import read_measures


def test_committed_jobs_survive_a_power_cut(database: Database) -> None:
    with database.read() as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA synchronous")) == 2  # FULL
        assert connection.scalar(text("PRAGMA foreign_keys")) == 1
        assert connection.scalar(text("PRAGMA busy_timeout")) == 5000


def test_clock_tells_unix_seconds(database: Database) -> None:
    with database.read() as connection:
        assert connection.scalar(select(database_now())) == pytest.approx(time.time(), abs=2.0)


def test_clock_in_postgresql_moves_within_a_transaction() -> None:
    from sqlalchemy.dialects import postgresql

    compiled = str(select(database_now()).compile(dialect=postgresql.dialect()))
    assert "clock_timestamp()" in compiled


def test_migrations_make_exactly_the_tables(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_an_older_database_is_brought_up_to_date(database: Database) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
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
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
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
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
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


def test_processes_may_migrate_at_the_same_time(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new' / 'jobs.db'}"
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


def test_writers_wait_for_each_other(database: Database) -> None:
    registry = WorkerRegistry(database, heartbeat_s=1.0)

    def write(name: int) -> None:
        for _ in range(10):
            registry.report(f"worker-{name}", models=("m",), device="cpu", rss_bytes=1, problem=None)

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(WorkerProcess)) == 4


def test_transactions_that_read_before_they_write_do_not_fail_each_other(database: Database) -> None:
    """Without the lock from the beginning, SQLite refuses the second of two such writers at once."""
    both_have_read = threading.Barrier(2)
    errors: list[BaseException] = []

    def read_then_write(name: str) -> None:
        try:
            with database.write() as connection:
                connection.scalar(select(func.count()).select_from(WorkerProcess))
                with suppress(threading.BrokenBarrierError):
                    both_have_read.wait(0.3)  # the second one is still waiting for the lock
                connection.execute(
                    insert(WorkerProcess).values(id=name, started_at=0, seen_at=0, models="", device="", rss_bytes=0)
                )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read_then_write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_memory_is_no_place_for_jobs() -> None:
    with pytest.raises(ValueError, match="must be a file"):
        Database("sqlite:///:memory:")
