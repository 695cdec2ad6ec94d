"""The database: durable, one clock, writers that wait for each other."""

import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from postgres_cluster import PostgresCluster
from sqlalchemy import func, insert, literal, select, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from server.jobs.database import BUSY_TIMEOUT_MS, Database, database_now, insert_if_absent
from server.jobs.model import Base, WorkerProcess
from server.jobs.workers import WorkerRegistry


def test_committed_jobs_survive_a_power_cut(database: Database) -> None:
    with database.read() as connection:
        if database.is_sqlite:
            assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
            assert connection.scalar(text("PRAGMA synchronous")) == 2  # FULL
            assert connection.scalar(text("PRAGMA foreign_keys")) == 1
            assert connection.scalar(text("PRAGMA busy_timeout")) == 5000
        else:
            assert connection.scalar(text("show synchronous_commit")) == "on"


def test_what_need_not_survive_a_power_cut_does_not_wait_for_the_disk(database: Database) -> None:
    setting = text("PRAGMA synchronous" if database.is_sqlite else "show synchronous_commit")
    found = []
    for is_durable in (True, False, True):
        with database.write(is_durable=is_durable) as connection:
            found.append(connection.scalar(setting))
    assert found == ([2, 1, 2] if database.is_sqlite else ["on", "off", "on"])  # 2: FULL, 1: NORMAL


def test_a_writer_that_waits_too_long_for_another_of_its_process_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(f"sqlite:///{tmp_path / 'jobs.db'}")
    monkeypatch.setattr("server.jobs.database.BUSY_TIMEOUT_MS", 50)
    problems: list[Exception] = []

    def write() -> None:
        try:
            with database.write():
                pass
        except OperationalError as error:
            problems.append(error)

    with database.write():
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert "database is locked" in str(problems[0])
    write()  # whoever comes later is not hindered
    assert len(problems) == 1
    database.close()


def test_a_writer_asks_for_its_turn_every_few_milliseconds_while_another_process_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, other = (Database(f"sqlite:///{tmp_path / 'jobs.db'}") for _ in range(2))
    tries: list[str] = []
    with ours.read() as connection:  # the one connection of its pool
        raw: Any = connection.connection.driver_connection
        raw.set_trace_callback(tries.append)
    with other.write():
        monkeypatch.setattr("server.jobs.database.BUSY_TIMEOUT_MS", 500)
        with pytest.raises(OperationalError, match="database is locked"), ours.write():
            pass
        monkeypatch.undo()
    assert sum(statement.startswith("BEGIN IMMEDIATE") for statement in tries) > 20
    with ours.write() as connection:
        assert connection.scalar(text("PRAGMA busy_timeout")) == BUSY_TIMEOUT_MS
    ours.close()
    other.close()


def test_a_damaged_file_is_told_as_all_errors_of_the_database_are(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    path.write_bytes(b"no database at all" * 1000)
    database = Database(f"sqlite:///{path}")
    with pytest.raises(SQLAlchemyError), database.write():
        pass
    database.close()


def test_what_reads_sees_one_moment(database: Database) -> None:
    registry = WorkerRegistry(database, heartbeat_s=60.0)
    query = select(func.count()).select_from(WorkerProcess)
    with database.read() as connection:
        assert connection.scalar(query) == 0
        writer = threading.Thread(
            target=registry.report, args=("w",), kwargs={"models": (), "device": "cpu", "rss_bytes": 1, "problem": None}
        )
        writer.start()
        writer.join()
        assert connection.scalar(query) == 0
    with database.read() as connection:
        assert connection.scalar(query) == 1


def test_clock_moves_within_a_transaction(database: Database) -> None:
    """A lease that is taken at the end of a long transaction is not shorter for it."""
    with database.write() as connection:
        before = connection.scalar(select(database_now()))
        time.sleep(0.02)
        after = connection.scalar(select(database_now()))
    assert 0.015 < after - before < 5.0


def test_clock_tells_unix_seconds(database: Database) -> None:
    with database.read() as connection:
        assert connection.scalar(select(database_now())) == pytest.approx(time.time(), abs=2.0)


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


def test_row_is_inserted_once(database: Database) -> None:
    values = {"tenant": "a", "start_tag": 1.0, "finish_tag": database_now()}
    for expected in (True, False):
        with database.write() as connection:
            assert insert_if_absent(connection, Base.metadata.tables["tenant_shares"], values) is expected


def test_memory_is_no_place_for_jobs() -> None:
    with pytest.raises(ValueError, match="must be a file"):
        Database("sqlite:///:memory:")


def test_other_databases_are_refused() -> None:
    with pytest.raises(ValueError, match="SQLite or PostgreSQL, not mysql"):
        Database("mysql://localhost/jobs")


def test_missing_driver_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ValueError, match=r"pip install 'medsora\[postgres\]'"):
        Database("postgresql://localhost/jobs")


def test_sessions_of_postgresql_cannot_hold_up_others_for_long(postgres_url: str) -> None:
    given = "options=-c%20statement_timeout%3D1234"
    for url, timeout in ((postgres_url, "30s"), (f"{postgres_url}&{given}", "1234ms")):
        database = Database(url)
        with database.read() as connection:
            assert connection.scalar(text("show statement_timeout")) == timeout
            assert connection.scalar(text("show idle_in_transaction_session_timeout")) == "20s"
            assert connection.scalar(text("show application_name")) == "medsora"
        database.close()


def test_text_is_text_in_a_database_made_without_a_locale(postgres_cluster: PostgresCluster) -> None:
    with postgres_cluster.connect() as admin:
        admin.execute("create database ascii template template0 encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C'")
    database = Database(postgres_cluster.url("ascii"))
    with database.read() as connection:
        assert connection.scalar(text("show server_encoding")) == "SQL_ASCII"
        assert connection.scalar(select(literal("Röntgen 肺"))) == "Röntgen 肺"
    database.close()
    postgres_cluster.drop_database("ascii")


def test_a_connection_that_was_cut_is_not_met_again(postgres_url: str, postgres_cluster: PostgresCluster) -> None:
    database = Database(postgres_url)
    with database.read() as connection:
        pid = connection.scalar(text("select pg_backend_pid()"))
    with postgres_cluster.connect() as admin:
        admin.execute("select pg_terminate_backend(%s, 10000)", [pid])
    with database.write() as connection:
        assert connection.scalar(text("select pg_backend_pid()")) != pid
    database.close()
