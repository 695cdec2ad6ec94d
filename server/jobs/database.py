"""Connection to the job database, its clock, and its schema (Alembic, in ``migrations/``).

SQLite runs in WAL mode with ``synchronous=FULL``: what was committed survives a power cut. Every transaction
that writes takes the write lock at its beginning, so that two writers wait for each other instead of failing.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Double, Engine, Table, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

__all__ = ["Database", "database_now", "insert_if_absent", "migrate"]

BUSY_TIMEOUT_MS = 5000
_MIGRATION_LOCK_KEY = 0x6D656473  # any number of our own for pg_advisory_lock


class database_now(FunctionElement[float]):  # noqa: N801 - reads like the SQL function that it is
    """The database's clock in Unix seconds (to about a millisecond): the only clock that leases know."""

    type = Double()
    inherit_cache = True


@compiles(database_now, "sqlite")
def _sqlite_now(element: database_now, compiler: Any, **kwargs: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(database_now, "postgresql")
def _postgresql_now(element: database_now, compiler: Any, **kwargs: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


class Database:
    """An engine with the two kinds of transaction that the repository needs.

    Args:
        url: SQLAlchemy URL; ``sqlite:///`` or PostgreSQL.
        is_durable: Whether what was committed outlives a power cut; where not, commits cost little.
    """

    def __init__(self, url: str, *, is_durable: bool = True) -> None:
        self.url = make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            if self.url.database in (None, "", ":memory:"):
                raise ValueError("the job database must be a file: several processes share it")
            self.engine = create_engine(
                self.url,
                connect_args={"timeout": BUSY_TIMEOUT_MS / 1000},
                hide_parameters=True,  # errors are logged, and parameters are prompts and secrets
            )
            _configure_sqlite(self.engine, is_durable=is_durable)
        else:
            options = {} if is_durable else {"connect_args": {"options": "-c synchronous_commit=off"}}
            self.engine = create_engine(
                self.url, hide_parameters=True, pool_pre_ping=True, pool_size=10, max_overflow=10, **options
            )
        self._writer = self.engine.execution_options(begin_immediate=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads: one consistent view."""
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write; committed (and on disk) when the block ends without an error."""
        with self._writer.begin() as connection:
            yield connection

    def close(self) -> None:
        """Close all pooled connections."""
        self.engine.dispose()


def insert_if_absent(connection: Connection, table: Table, values: dict[str, Any]) -> bool:
    """Insert a row unless one with the same key is there; whether it was inserted.

    In PostgreSQL it waits for a transaction that inserts the same key at the same time.
    """
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    return connection.execute(dialect.insert(table).values(values).on_conflict_do_nothing()).rowcount == 1


def _configure_sqlite(engine: Engine, *, is_durable: bool) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, below
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            "journal_mode=WAL",
            f"synchronous={'FULL' if is_durable else 'NORMAL'}",
            "foreign_keys=ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("begin_immediate", False)
        # A deferred transaction that turns into a writer fails at once when another wrote in between.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def migrate(database: Database) -> None:
    """Bring the schema up to date; several processes may do so at once, one after the other does it."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every connection that it finds in order
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    if database.is_sqlite:
        path = Path(str(database.url.database))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # prompts are in it; SQLite gives its other files the same mode
        # SQLite commits schema changes one by one: a lock file keeps two processes apart.
        lock = os.open(f"{path}.migrate.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _upgrade(database, config)
        finally:
            os.close(lock)
    else:
        with database.engine.connect() as guard:
            guard.execute(text("select pg_advisory_lock(:key)"), {"key": _MIGRATION_LOCK_KEY})
            try:
                _upgrade(database, config)
            finally:
                guard.execute(text("select pg_advisory_unlock(:key)"), {"key": _MIGRATION_LOCK_KEY})
                guard.commit()


def _upgrade(database: Database, config: Config) -> None:
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
