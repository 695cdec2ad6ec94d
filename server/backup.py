"""Backups: a whole database and every file that it names, taken while the server runs; and putting one back.

A backup is a folder: ``database.sqlite`` or ``database.dump``, a folder for each kind of files, and ``backup.json``
with size and SHA-256 of each, written last: what has it is whole. The database is copied as it is at one moment, by
SQLite's own online copy or by ``pg_dump``. A file that the copy names may be deleted before it is copied; then the
database is copied once more.
"""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from sqlalchemy import Connection, create_engine, inspect, select
from sqlalchemy.exc import SQLAlchemyError

import medsora
from medsora.files import sha256_of, sync, write_file
from server.datasets.files import DatasetFiles
from server.datasets.model import ClipState, Dataset, DatasetClip
from server.files.model import File
from server.files.store import FileStore
from server.jobs.database import Database
from server.jobs.model import Job, JobStatus
from server.jobs.repository import JobRepository
from server.jobs.schema import migrate, schema_position
from server.objects import LocalObjects, Objects, objects_of
from server.settings import Settings
from server.sources.model import Source
from server.storage import ArtifactStore, Variant

__all__ = ["BackupError", "Summary", "make_backup", "restore_backup"]

Kind = Literal["artifacts", "files", "sources", "datasets"]
_FORMAT = 1
_ROUNDS = 5
_COPY_BYTES = 2**20


class BackupError(Exception):
    """It cannot be done; says why and what to do."""


@dataclass
class Summary:
    """What was copied."""

    objects: int = 0
    size_bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    """Files that do not have the hash that the database knows of them, or that are gone."""
    running: int = 0
    """Jobs that were running; after a restore they wait again."""

    @property
    def text(self) -> str:
        """For people."""
        lines = [f"database and {self.objects} files ({self.size_bytes / 2**20:.1f} MiB)"]
        if self.running:
            lines.append(f"{self.running} jobs were running: they wait to be made")
        lines += [f"DAMAGED OR MISSING: {name}" for name in self.damaged]
        return "\n".join(lines)


# -- making one --------------------------------------------------------------------------------------------------------


def make_backup(settings: Settings, folder: Path) -> Summary:
    """Write a backup of everything that the settings' server keeps.

    Raises:
        BackupError: The folder is there already, there is no database, or its copy failed.
        OSError: A file cannot be read, or the backup not be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BackupError(f"{folder} is there and not empty: name a new folder")
    database = Database(settings.database_address)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        copied: dict[str, dict[str, Any]] = {}
        for attempt in range(_ROUNDS):
            with _copied_database(database, folder) as connection:
                position, _ = schema_position(connection)
                if position is None:
                    raise BackupError("the database has no tables yet: there is nothing to copy")
                schema = position.revision
                wanted = dict(_named_files(connection))
                summary = Summary(running=_count_running(connection))
            _copy_files(settings, folder, wanted, copied)
            missing = sorted(set(wanted) - set(copied))
            # what the copy names and is gone was deleted meanwhile, or was missing before: the next round tells
            if not missing or attempt == _ROUNDS - 1 or not _names_fewer(database, missing):
                break
    except SQLAlchemyError as error:
        raise BackupError(f"the database cannot be read: {error}") from error
    finally:
        database.close()
    summary.damaged += [f"{name}: gone" for name in missing]
    for name, about in sorted(copied.items()):
        expected = wanted.get(name)
        if expected is not None and expected != about["sha256"]:
            summary.damaged.append(f"{name}: has another hash than when it was made")
    summary.objects = len(copied)
    summary.size_bytes = sum(about["size_bytes"] for about in copied.values())
    about_all = {
        "format": _FORMAT,
        "made_at": time.time(),
        "server_version": medsora.__version__,
        "schema": schema,
        "database": {"name": _dump_name(database), "sha256": sha256_of(folder / _dump_name(database))},
        "damaged": summary.damaged,
        "files": copied,
    }
    write_file(folder / "backup.json", json.dumps(about_all, indent=1, sort_keys=True).encode())
    sync(folder)
    return summary


def _dump_name(database: Database) -> str:
    return "database.sqlite" if database.is_sqlite else "database.dump"


@contextmanager
def _copied_database(database: Database, folder: Path) -> Iterator[Connection]:
    """Copy the database; the connection sees just what was copied."""
    target = folder / _dump_name(database)
    target.unlink(missing_ok=True)
    if database.is_sqlite:
        origin = Path(str(database.url.database))
        if not origin.exists():
            raise BackupError(f"there is no database {origin}: set MEDSORA_DATA_DIR or MEDSORA_DATABASE_URL")
        with closing(sqlite3.connect(origin)) as source, closing(sqlite3.connect(target)) as copy:
            source.backup(copy, pages=4096)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, and nothing beside it
        sync(target)
        copied = create_engine(f"sqlite:///{target}")
        try:
            with copied.connect() as connection:
                yield connection
        finally:
            copied.dispose()
        return
    engine = database.engine.execution_options(isolation_level="REPEATABLE READ")
    with engine.connect() as connection:
        snapshot = str(connection.exec_driver_sql("select pg_export_snapshot()").scalar_one())
        _run_postgres(database, "pg_dump", "--format=custom", f"--snapshot={snapshot}", f"--file={target}")
        sync(target)
        yield connection


def _run_postgres(database: Database, program: str, *arguments: str) -> None:
    """Run a program of PostgreSQL on the database. The password goes by the environment, which no ``ps`` shows."""
    url = database.url
    environment = {**os.environ, **({"PGPASSWORD": str(url.password)} if url.password else {})}
    address = url.set(drivername="postgresql", password=None).render_as_string(hide_password=False)
    try:
        done = subprocess.run(
            [program, *arguments, f"--dbname={address}"], env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise BackupError(f"{program} is not installed: install PostgreSQL's client programs") from None
    if done.returncode != 0:
        raise BackupError(f"{program} failed: {done.stderr.strip()[-500:]}")


def _named_files(connection: Connection) -> Iterator[tuple[str, str | None]]:
    """``<kind>/<key>`` and SHA-256, where it is known, of every file that must be there."""
    columns = (Job.artifact, Job.sha256, Job.thumbnail_sha256, Job.spritesheet_sha256)
    finished = select(*columns).where(
        Job.status == JobStatus.SUCCEEDED.value, Job.artifact.is_not(None), Job.deleted_at.is_(None)
    )
    keys = ArtifactStore(Path())
    for name, *hashes in connection.execute(finished):
        assert name is not None
        for variant, sha256 in zip((Variant.VIDEO, Variant.THUMBNAIL, Variant.SPRITESHEET), hashes, strict=True):
            if sha256 is not None:
                yield f"artifacts/{keys.key(name, variant)}", sha256
    store = FileStore(Path())
    for file_id, sha256 in connection.execute(select(File.id, File.sha256).where(File.removed_at.is_(None))):
        yield f"files/{store.key(file_id)}", sha256
    for source_id, sha256 in connection.execute(select(Source.id, Source.sha256)):
        yield f"sources/{store.key(source_id)}", sha256
    clips = (
        select(Dataset.id, DatasetClip.job_id, DatasetClip.attempt)
        .join(Dataset, Dataset.seq == DatasetClip.dataset_seq)
        .where(Dataset.deleted_at.is_(None), DatasetClip.state == ClipState.DONE)
    )
    for dataset_id, job_id, attempt in connection.execute(clips):
        assert job_id is not None
        assert attempt is not None
        yield f"datasets/{DatasetFiles.key(dataset_id, job_id, attempt)}", None


def _names_fewer(database: Database, names: list[str]) -> bool:
    """Whether the database has meanwhile let go of some of these."""
    with database.read() as connection:
        return not set(names) <= set(dict(_named_files(connection)))


def _count_running(connection: Connection) -> int:
    return len(connection.execute(select(Job.seq).where(Job.status == JobStatus.RUNNING.value)).all())


def _copy_files(
    settings: Settings, folder: Path, wanted: dict[str, str | None], copied: dict[str, dict[str, Any]]
) -> None:
    """Copy what is not copied yet of what the database names, and what lies beside a video."""
    for kind in get_args(Kind):
        objects, target = objects_of(settings, kind), LocalObjects(folder / kind)
        keys = {name.removeprefix(f"{kind}/") for name in wanted if name.startswith(f"{kind}/")}
        if kind == "artifacts":  # of these the database knows no hash, nor whether a video has them
            store = ArtifactStore(objects)
            videos = [key for key in keys if key.endswith(".mp4")]
            keys |= {store.key(key, beside) for key in videos for beside in (Variant.PROVENANCE, Variant.LOSSLESS)}
        for key in sorted(keys - {name.removeprefix(f"{kind}/") for name in copied}):
            try:
                about = _copy(objects, target, key)
            except FileNotFoundError:
                continue
            copied[f"{kind}/{key}"] = about


def _copy(origin: Objects, target: Objects, key: str) -> dict[str, Any]:
    """Copy an object; returns its size and hash, as they were read."""
    path = target.stage(f"{key}.part")
    hashed, size = hashlib.sha256(), 0
    with origin.open(key) as source, path.open("wb") as copy:
        while content := source.read(_COPY_BYTES):
            hashed.update(content)
            size += len(content)
            copy.write(content)
    sync(path)
    target.publish({path: key})
    return {"size_bytes": size, "sha256": hashed.hexdigest()}


# -- putting one back --------------------------------------------------------------------------------------------------


def restore_backup(settings: Settings, folder: Path) -> Summary:
    """Put a backup where the settings' server keeps its data. Jobs that ran when it was made wait again.

    Raises:
        BackupError: It is no whole backup, or there is data already.
        OSError: A file cannot be read or written.
    """
    about = _read_backup(folder)
    database = Database(settings.database_address)
    try:
        if (about["database"]["name"] == "database.sqlite") != database.is_sqlite:
            raise BackupError("the backup is of another kind of database than MEDSORA_DATABASE_URL names")
        _check_empty(settings, database)
        summary = Summary(damaged=list(about["damaged"]))
        # once a kind: in a bucket each look at the settings also sweeps the scratch folder
        places = {kind: (LocalObjects(folder / kind), objects_of(settings, kind)) for kind in get_args(Kind)}
        for name, known in sorted(about["files"].items()):
            kind, _, key = name.partition("/")
            put_back = _copy(*places[kind], key)
            if put_back != known:
                raise BackupError(f"{folder / name} is damaged: it is not what was copied")
            summary.objects += 1
            summary.size_bytes += known["size_bytes"]
        _restore_database(database, folder / about["database"]["name"])
        migrate(database)
        repository = JobRepository(database, lease_s=settings.lease_s, max_attempts=settings.max_attempts)
        summary.running = repository.begin_anew()
    except SQLAlchemyError as error:
        raise BackupError(f"the database cannot be written: {error}") from error
    finally:
        database.close()
    return summary


def _read_backup(folder: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((folder / "backup.json").read_text())
    except FileNotFoundError:
        raise BackupError(f"{folder} is no whole backup: it has no backup.json") from None
    except ValueError as error:
        raise BackupError(f"{folder / 'backup.json'} is damaged: {error}") from None
    if about.get("format") != _FORMAT:
        raise BackupError(f"{folder} has format {about.get('format')}, this version reads {_FORMAT}")
    name = about["database"]["name"]
    if name not in ("database.sqlite", "database.dump") or sha256_of(folder / name) != about["database"]["sha256"]:
        raise BackupError(f"{folder / name} is damaged: it is not what was copied")
    return about


def _check_empty(settings: Settings, database: Database) -> None:
    advice = "move it away first, or name another place"
    if database.is_sqlite:
        if Path(str(database.url.database)).exists():
            raise BackupError(f"there is a database {database.url.database}: {advice}")
    elif inspect(database.engine).get_table_names():
        raise BackupError(f"the database {database.url.database} has tables: {advice}")
    for kind in get_args(Kind):
        if next(objects_of(settings, kind).list(), None) is not None:
            raise BackupError(f"there are files of the kind {kind} already: {advice}")


def _restore_database(database: Database, dump: Path) -> None:
    if not database.is_sqlite:
        _run_postgres(database, "pg_restore", "--no-owner", "--exit-on-error", "--single-transaction", str(dump))
        return
    target = Path(str(database.url.database))
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.part")
    shutil.copyfile(dump, partial)
    sync(partial)
    partial.replace(target)
    sync(target.parent)
