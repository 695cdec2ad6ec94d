"""The schema of the job database: which revision it has, and how it comes to the newest (Alembic, in ``migrations/``).

Every process asks at its start, and most find nothing to do: Alembic, whose import alone takes longer than that, is
loaded only by who changes something.
"""

import fcntl
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from server.jobs.database import Database

__all__ = ["SchemaPosition", "migrate", "schema_position"]

_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK_KEY = 0x6D656473  # any number of our own for pg_advisory_xact_lock


@dataclass(frozen=True)
class SchemaPosition:
    """The revision of a database's schema, and whether this version of the server does not know it yet."""

    revision: str
    is_newer: bool


def schema_position(connection: Connection) -> tuple[SchemaPosition | None, str]:
    """Where a database's schema is (None: it has none), and the newest revision that this server knows."""
    known = _known_revisions()
    revision = None
    if inspect(connection).has_table("alembic_version"):
        revision = connection.scalar(text("select version_num from alembic_version"))
    position = None if revision is None else SchemaPosition(str(revision), is_newer=revision not in known)
    return position, known[-1]


def migrate(database: Database) -> None:
    """Bring the schema up to date; several processes may do so at once, one after the other does it."""
    path = Path(str(database.url.database))
    if database.is_sqlite:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # prompts are in it; SQLite gives its other files the same mode
    if not (database.is_sqlite and path.stat().st_size == 0):  # a new file has no schema
        with database.read() as connection:
            position, newest = schema_position(connection)
        if position == SchemaPosition(newest, is_newer=False):
            return
    if database.is_sqlite:
        # SQLite commits schema changes one by one: a lock file keeps two processes apart.
        lock = os.open(f"{path}.migrate.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _upgrade(database)
        finally:
            os.close(lock)
    else:
        _upgrade(database)


def _upgrade(database: Database) -> None:
    from alembic import command
    from alembic.config import Config

    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every connection that it finds in order
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with database.write() as connection:
        if not database.is_sqlite:
            # Changes of the schema are part of the transaction, and so is the lock that keeps two processes apart.
            connection.execute(text("set local statement_timeout = 0"))
            connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK_KEY})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _known_revisions() -> list[str]:
    """By the names of their files, ``v<revision>_<what>.py``, in order."""
    names = [path.name for path in (_MIGRATIONS / "versions").glob("v*.py")]
    return sorted(found[1] for name in names if (found := re.match(r"v([0-9]{4})_", name)))
