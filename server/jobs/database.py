"""Connection to the job database, and its clock; the schema is in ``schema.py``.

SQLite runs in WAL mode with ``synchronous=FULL``: what was committed survives a power cut, but for what says that it
need not. Every transaction that writes takes the write lock at its beginning, so that two writers wait for each other
instead of failing. Those of one process wait for one another without trying, those of several try again and again.

PostgreSQL runs what reads in REPEATABLE READ, where nothing that only reads can fail, and what writes in READ
COMMITTED: writers lock the rows that they choose, several rows in one order, so none ends in a deadlock or needs to be
tried again (:func:`lock_rows`).
"""

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import chain, repeat
from typing import Any

from sqlalchemy import (
    URL,
    ClauseElement,
    Connection,
    Double,
    Engine,
    Select,
    Table,
    create_engine,
    event,
    literal_column,
    make_url,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

__all__ = ["Database", "DatabaseURLError", "database_now", "insert_if_absent", "lock_rows"]

BUSY_TIMEOUT_MS = 5000
_TRIES_MS = (1, 2, 4, 8)
"""Pauses between tries for the write lock; the last is repeated."""
_CONNECTIONS = 20
"""Most connections to PostgreSQL of one :class:`Database`."""

_POSTGRESQL_SESSION = {
    # No query of ours takes a second; one that does not end must not hold up whoever waits for its locks.
    "statement_timeout": "30s",
    # A process that is frozen within a transaction loses it, and the locks with it.
    "idle_in_transaction_session_timeout": "20s",
}
# A host that is gone without a word is noticed after about half a minute, and not when TCP gives up after many.
_POSTGRESQL_CONNECTION: dict[str, Any] = {
    "client_encoding": "utf8",  # else a database made without a locale (SQL_ASCII) gives bytes in place of text
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}


class DatabaseURLError(ValueError):
    """A URL of a database that jobs cannot be kept in, or whose driver is not installed."""


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
        url: SQLAlchemy URL; ``sqlite:///`` or ``postgresql://``, which psycopg speaks to.

    Raises:
        DatabaseURLError: Jobs cannot be kept there, or the driver is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            if self.url.database in (None, "", ":memory:"):
                raise DatabaseURLError("the job database must be a file: several processes share it")
            self.engine = create_engine(
                self.url,
                connect_args={"timeout": BUSY_TIMEOUT_MS / 1000},
                hide_parameters=True,  # errors are logged, and parameters are prompts and secrets
            )
            _configure_sqlite(self.engine)
            self._reader = self.engine
        else:
            self.engine = _postgresql_engine(self.url)
            self._reader = self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._writer = self.engine.execution_options(begin_immediate=True)
        self._quick_writer = self._writer.execution_options(is_durable=False)
        self._turn = threading.Lock()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads: one consistent view."""
        with self._reader.begin() as connection:
            yield connection

    @contextmanager
    def write(self, *, is_durable: bool = True) -> Iterator[Connection]:
        """A transaction that may write; committed (and on disk) when the block ends without an error.

        Args:
            is_durable: False: it costs little, but a power cut may undo it. It is never undone without those after it.

        Raises:
            OperationalError: The database cannot be reached; or, of SQLite, others of this process write for 5 s, or
                those of other processes for 5 s more.
        """
        engine = self._writer if is_durable else self._quick_writer
        if not self.is_sqlite:
            with engine.begin() as connection:
                if not is_durable:
                    connection.execute(text("set local synchronous_commit = off"))
                yield connection
            return
        if not self._turn.acquire(timeout=BUSY_TIMEOUT_MS / 1000):
            raise OperationalError("BEGIN IMMEDIATE", None, sqlite3.OperationalError("database is locked"))
        try:
            with engine.begin() as connection:
                yield connection
        finally:
            self._turn.release()

    def close(self) -> None:
        """Close all pooled connections."""
        self.engine.dispose()


def insert_if_absent(connection: Connection, table: Table, values: dict[str, Any]) -> bool:
    """Insert a row unless one with the same key is there; whether it was inserted.

    In PostgreSQL it waits for a transaction that inserts the same key at the same time.
    """
    statement = _insertion_if_absent(connection.dialect.name, table)
    computed = {name: value for name, value in values.items() if isinstance(value, ClauseElement)}
    if computed:
        statement = statement.values(computed)
    given = {name: value for name, value in values.items() if name not in computed}
    return connection.execute(statement, given).one_or_none() is not None


@cache
def _insertion_if_absent(dialect_name: str, table: Table) -> Any:
    """Put together once: that costs more than running it."""
    dialect = sqlite if dialect_name == "sqlite" else postgresql
    # not rowcount, which psycopg does not tell of an insertion
    return dialect.insert(table).on_conflict_do_nothing().returning(literal_column("1"))


def lock_rows(
    connection: Connection, query: Select[Any], values: Mapping[str, Any] | None = None, *, skip_locked: bool = False
) -> list[int]:
    """Numbers of the chosen rows of a table, locked until the transaction is over. SQLite has one writer anyway.

    Whoever changes several rows in one transaction locks them so beforehand: two that want the same rows then wait for
    each other and do not deadlock.

    Args:
        query: Selects the rows' numbers in rising order, the order in which all lock them.
        values: Of its parameters.
        skip_locked: Leave out rows that another transaction is at.
    """
    return list(connection.scalars(query.with_for_update(skip_locked=skip_locked), values))


def _postgresql_engine(url: URL) -> Engine:
    if url.get_backend_name() != "postgresql":
        raise DatabaseURLError(f"the job database is SQLite or PostgreSQL, not {url.get_backend_name()}")
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    options = [f"-c {name}={value}" for name, value in _POSTGRESQL_SESSION.items()]
    given = url.query.get("options", ())  # the operator's word is the last
    options += [given] if isinstance(given, str) else given
    defaults = {name: value for name, value in _POSTGRESQL_CONNECTION.items() if name not in url.query}
    try:
        return create_engine(
            url,
            connect_args={"application_name": "medsora", **defaults, "options": " ".join(options)},
            hide_parameters=True,
            pool_pre_ping=True,  # after a restart of PostgreSQL no request meets a dead connection
            pool_size=_CONNECTIONS // 2,
            max_overflow=_CONNECTIONS - _CONNECTIONS // 2,
            pool_timeout=10.0,
            pool_use_lifo=True,  # so that what a rush has opened falls idle, and a proxy between may close it
        )
    except ModuleNotFoundError as error:
        raise DatabaseURLError(
            f"{error.name} is missing, which speaks to PostgreSQL; install it: pip install 'medsora[postgres]'"
        ) from error


def _configure_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, below
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        immediate = options.get("begin_immediate", False)
        wanted = "FULL" if options.get("is_durable", True) else "NORMAL"
        if immediate and connection.info.setdefault("synchronous", "FULL") != wanted:
            connection.exec_driver_sql(f"PRAGMA synchronous={wanted}")
            connection.info["synchronous"] = wanted
        # A deferred transaction that turns into a writer fails at once when another wrote in between.
        if immediate:
            _begin_immediate(connection.connection.driver_connection)
        else:
            connection.exec_driver_sql("BEGIN")


def _begin_immediate(connection: Any) -> None:
    """Take the write lock. SQLite by itself tries ever more rarely, so that who has waited longest waits on."""
    give_up_at = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    pauses = chain(_TRIES_MS, repeat(_TRIES_MS[-1]))
    try:
        connection.execute("PRAGMA busy_timeout=0")
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.Error as error:
                is_busy = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
                if not is_busy or time.monotonic() > give_up_at:  # as SQLAlchemy says it of a statement of its own
                    raise DBAPIError.instance("BEGIN IMMEDIATE", None, error, sqlite3.Error) from error
                time.sleep(next(pauses) / 1000)
            else:
                return
    finally:
        connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
