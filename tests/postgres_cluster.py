"""A private PostgreSQL for tests and benchmarks: a cluster in a temporary folder, reached by a Unix socket alone."""

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

__all__ = ["MISSING", "PostgresCluster", "find_programs"]

MISSING = "needs PostgreSQL: no initdb in /usr/lib/postgresql/*/bin nor on the PATH (tests/system_packages.sh)"
_USER = "medsora"
_TEMPLATE = "medsora_template"
_PR_SET_PDEATHSIG = 1
_ENOUGH_MEMORY = 2 << 30


def find_programs() -> Path | None:
    """Folder of the newest PostgreSQL's programs; None: there is none on this machine."""
    debian = Path("/usr/lib/postgresql")
    versions = sorted(
        (path for path in debian.glob("*/bin") if path.parent.name.isdigit()), key=lambda path: int(path.parent.name)
    )
    on_path = shutil.which("initdb")
    found = [path for path in reversed(versions) if (path / "initdb").exists()]
    if found:
        return found[0]
    return None if on_path is None else Path(on_path).resolve().parent


class PostgresCluster:
    """A cluster that runs from its making to :meth:`close`; its folder goes with it.

    Args:
        programs: From :func:`find_programs`.
        is_durable: Whether commits wait for the disk, as they should where figures are measured; else all is kept in
            memory where there is a file system for that: a new database takes a tenth of the time then.
        options: Settings of the server, such as ``max_connections``.
    """

    def __init__(self, programs: Path, *, is_durable: bool = False, **options: str) -> None:
        self._programs = programs
        # PostgreSQL refuses to run as root.
        self._owner = _unprivileged_user() if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="medsora-pg-", dir=None if is_durable else _memory()))
        if self._owner is not None:
            os.chown(self.folder, self._owner.pw_uid, self._owner.pw_gid)
        self._data, self._log = self.folder / "data", self.folder / "log"
        self._options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "max_connections": "300",
            "shared_buffers": "128MB",
            **({} if is_durable else {"fsync": "off", "full_page_writes": "off", "max_wal_size": "256MB"}),
            **options,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._number = 0
        self._has_template = False
        try:
            initdb = [self._programs / "initdb", "-D", self._data, "-U", _USER, "-A", "trust", "-E", "UTF8"]
            initdb += ["--locale=C", "--no-sync", "--no-instructions"]
            made = subprocess.run(initdb, **self._as_owner(), capture_output=True, text=True, check=False)
            if made.returncode != 0:
                raise RuntimeError(f"initdb: {made.stderr}")
            self.start()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def url(self, name: str) -> str:
        """SQLAlchemy URL of a database of the cluster."""
        return f"postgresql://{_USER}@/{name}?host={self.folder}"

    def connect(self, name: str = "postgres") -> psycopg.Connection[tuple[object, ...]]:
        """A connection of the cluster's owner that commits each statement."""
        return psycopg.connect(host=str(self.folder), user=_USER, dbname=name, autocommit=True)

    def create_database(self, *, is_empty: bool = False) -> str:
        """Make a database with the newest schema, or without any; returns its name."""
        if not is_empty and not self._has_template:
            from server.jobs.database import Database
            from server.jobs.schema import migrate

            self._create(_TEMPLATE, "template0")
            database = Database(self.url(_TEMPLATE))
            migrate(database)
            database.close()
            self._has_template = True
        self._number += 1
        name = f"test_{self._number}"
        self._create(name, "template0" if is_empty else _TEMPLATE)
        return name

    def drop_database(self, name: str) -> None:
        """Remove a database, whoever is still connected to it."""
        with self.connect() as connection:
            connection.execute(f"drop database {name} with (force)".encode())

    def _create(self, name: str, template: str) -> None:
        with self.connect() as connection:
            connection.execute(f"create database {name} template {template}".encode())

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [str(self._programs / "postgres"), "-D", str(self._data)]
        for name, value in self._options.items():
            command += ["-c", f"{name}={value}"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                **self._as_owner(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                self.connect().close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"PostgreSQL does not start:\n{self._log.read_text()[-3000:]}") from None
                time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server: SIGINT ends all connections and writes everything; SIGQUIT is a crash, recovered from."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(60)
            self._process = None

    def close(self) -> None:
        """Stop the server and remove all it had."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _as_owner(self) -> dict[str, object]:
        if self._owner is None:
            return {"cwd": self.folder}
        return {"cwd": self.folder, "user": self._owner.pw_uid, "group": self._owner.pw_gid, "extra_groups": []}


def _memory() -> Path | None:
    """A file system in memory with room enough; None: there is none."""
    memory = Path("/dev/shm")
    try:
        return memory if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= _ENOUGH_MEMORY else None
    except OSError:
        return None


def _unprivileged_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise RuntimeError("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
