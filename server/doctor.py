"""``medsora-server doctor``: looks at everything that the server needs, and says what to do about what is wrong.

Made for when things are broken: no check needs another one to succeed, none waits for long, and none changes anything
but a small file that it writes and removes.
"""

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, func, select, text
from sqlalchemy.exc import SQLAlchemyError

from medsora.errors import CheckpointError
from medsora.files import sha256_of
from medsora.manifest import find_checkpoint, read_manifest
from server.embedded import ServeError, find_redis_server
from server.jobs.database import Database, database_now
from server.jobs.model import Job, JobStatus
from server.jobs.schema import schema_position
from server.jobs.workers import WorkerRegistry
from server.keys.repository import KeyRepository
from server.objects import StorageFullError, nearest_folder, objects_of
from server.settings import Settings, SettingsError

__all__ = ["Finding", "State", "examine", "show_json", "show_table"]

_CONNECT_S = 3
_MOST_SKEW_S = 2.0
_LATE_S = 60.0


class State(StrEnum):
    """How a part is."""

    OK = "ok"
    WARNING = "warning"
    FAILING = "failing"
    SKIPPED = "skipped"


_STYLES = {State.OK: "green", State.WARNING: "yellow", State.FAILING: "bold red", State.SKIPPED: "dim"}


@dataclass(frozen=True)
class Finding:
    """What was found of a part; ``advice`` says what to do, and is there wherever something is wrong."""

    part: str
    state: State
    found: str
    advice: str | None = None


def examine(settings: Settings) -> list[Finding]:
    """Look at every part."""
    findings: list[Finding] = []
    for part, check in _CHECKS.items():
        try:
            findings += check(settings)
        except Exception as error:
            found = f"the check itself failed: {type(error).__name__}: {error}"
            findings.append(
                Finding(part, State.FAILING, found, "Please report this; the log of the part may say more.")
            )
    return findings


def show_json(findings: list[Finding]) -> None:
    """Print the findings as one JSON object."""
    worst = next(
        (state for state in (State.FAILING, State.WARNING) if any(one.state is state for one in findings)), State.OK
    )
    print(json.dumps({"state": worst, "findings": [asdict(one) for one in findings]}, indent=2))


def show_table(findings: list[Finding]) -> None:
    """Print the findings for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in findings:
        told = Text(one.found if one.advice is None else f"{one.found}\n-> {one.advice}")
        table.add_row(Text(one.state.value, style=_STYLES[one.state]), Text(one.part), told)
    console = Console(soft_wrap=False)
    if not console.is_terminal:  # in a pipe nothing is broken or cut
        for one in findings:
            print(f"{one.state.value:8} {one.part}: {one.found}" + (f" -> {one.advice}" if one.advice else ""))
        return
    console.print(table)


# -- database ----------------------------------------------------------------------------------------------------------


def _check_database(settings: Settings) -> Iterator[Finding]:
    database = Database(settings.database_address)
    try:
        if database.is_sqlite:
            path = Path(str(database.url.database))
            try:
                exists = path.exists()
            except OSError:  # its folder may not be looked into
                exists = True
            if not exists:
                yield Finding("database", State.OK, f"{path} is not there yet; the first start makes it")
                return
            if not os.access(path, os.R_OK | os.W_OK):
                advice = f"Give the user that runs the server the right to read and write {path} and its folder."
                yield Finding("database", State.FAILING, f"{path} cannot be read and written", advice)
                return
        engine = _engine_in_a_hurry(database)
        try:
            with engine.connect() as connection:
                yield from _look_into_database(settings, database, connection)
        finally:
            engine.dispose()
    except SQLAlchemyError as error:
        yield Finding("database", State.FAILING, _first_line(error), _database_advice(database, error))
    finally:
        database.close()


def _engine_in_a_hurry(database: Database) -> Engine:
    limit = {"timeout": _CONNECT_S} if database.is_sqlite else {"connect_timeout": _CONNECT_S}
    return create_engine(database.url, connect_args=limit, hide_parameters=True)


def _database_advice(database: Database, error: SQLAlchemyError) -> str:
    message = str(error).lower()
    shown = database.url.render_as_string(hide_password=True)
    if "password" in message or "authentication" in message:
        return f"Correct user or password in MEDSORA_DATABASE_URL ({shown})."
    if "malformed" in message or "not a database" in message:
        return "The file is damaged: stop the server and restore a backup (docs/operations.md)."
    if "locked" in message:
        return "Another program holds the database: end it, or wait until it is done."
    if "does not exist" in message:
        return f"Make the database or user that MEDSORA_DATABASE_URL names ({shown})."
    return f"Start the database, or correct MEDSORA_DATABASE_URL ({shown})."


def _look_into_database(settings: Settings, database: Database, connection: Connection) -> Iterator[Finding]:
    if database.is_sqlite:
        problem = connection.execute(text("PRAGMA quick_check(1)")).scalar_one()
        if problem != "ok":
            advice = "Stop the server and restore a backup (docs/operations.md)."
            yield Finding("database", State.FAILING, f"the file is damaged: {problem}", advice)
            return
    current, head = schema_position(connection)
    what = connection.dialect.name
    if current is None:
        yield Finding("database", State.OK, f"{what} answers and is empty; the first start makes the tables")
        return
    if current.is_newer:
        advice = "Install the newer version of the server that has written it, or restore a backup of this version's."
        found = f"{what} has schema {current.revision}, which is newer than this server's {head}"
        yield Finding("database", State.FAILING, found, advice)
        return
    if current.revision != head:
        advice = "Nothing: the next start brings it up to date. Make a backup before."
        found = f"{what} has schema {current.revision}, this server {head}"
        yield Finding("database", State.WARNING, found, advice)
        return
    yield Finding("database", State.OK, f"{what} answers, schema {head}")
    before = time.time()
    skew_s = float(connection.execute(select(database_now())).scalar_one()) - (before + time.time()) / 2
    if abs(skew_s) > _MOST_SKEW_S:
        found = f"the database's clock is {abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's"
        advice = "Let both take the time from the same server (NTP): logs, signed links and keys' expiry go by it."
        yield Finding("clock", State.WARNING, found, advice)
    else:
        yield Finding("clock", State.OK, f"database and machine differ by {abs(skew_s):.2f} s")
    yield from _look_at_work(settings, database, connection)


def _look_at_work(settings: Settings, database: Database, connection: Connection) -> Iterator[Finding]:
    """Whether somebody does it."""
    workers = WorkerRegistry(database, heartbeat_s=settings.worker_heartbeat_s).alive()
    problems = sorted({worker.problem for worker in workers if worker.problem is not None})
    if not workers:
        advice = "Start one: `medsora-server worker`, or `medsora-server serve` for everything on one machine."
        yield Finding("workers", State.WARNING, "no sampling process is alive", advice)
    elif problems:
        yield Finding(
            "workers", State.WARNING, " ".join(problems), "Wait if it starts; else see the log of the worker."
        )
    else:
        yield Finding("workers", State.OK, f"{len(workers)} sampling processes are alive")
    late = connection.execute(
        select(func.count())
        .select_from(Job)
        .where(Job.status == JobStatus.RUNNING, Job.lease_until < database_now() - _LATE_S)
    ).scalar_one()
    if late:
        advice = "Start `medsora-server reaper`: it gives them to other workers."
        yield Finding("reaper", State.FAILING, f"{late} jobs of lost workers wait to be given back", advice)
    else:
        yield Finding("reaper", State.OK, "no job of a lost worker waits")


# -- broker ------------------------------------------------------------------------------------------------------------


def _check_redis(settings: Settings) -> Iterator[Finding]:
    if settings.redis_url is None:
        try:
            program = find_redis_server()
        except ServeError as error:
            yield Finding("redis", State.FAILING, "none is set, and there is no redis-server to start", f"{error}.")
        else:
            yield Finding("redis", State.OK, f"MEDSORA_REDIS_URL is not set: `serve` starts its own ({program})")
        return
    import redis

    url = settings.redis_url.get_secret_value().replace("redis+socket://", "unix://", 1)
    client = redis.Redis.from_url(url, socket_timeout=_CONNECT_S, socket_connect_timeout=_CONNECT_S)
    try:
        about: Any = client.info("server")
        yield Finding("redis", State.OK, f"Redis {about.get('redis_version')} answers")
        yield from _check_eviction(client)
    except redis.exceptions.AuthenticationError as error:
        yield Finding("redis", State.FAILING, f"refuses: {error}", "Correct user or password in MEDSORA_REDIS_URL.")
    except redis.exceptions.BusyLoadingError as error:
        yield Finding("redis", State.WARNING, str(error), "Wait until it has read its file.")
    except redis.exceptions.RedisError as error:
        advice = "Start Redis, or correct MEDSORA_REDIS_URL. Jobs are still taken meanwhile, and made afterwards."
        yield Finding("redis", State.FAILING, f"does not answer: {_first_line(error)}", advice)
    finally:
        client.close()


def _check_eviction(client: Any) -> Iterator[Finding]:
    import redis

    try:
        policy = client.config_get("maxmemory-policy").get("maxmemory-policy", "")
    except redis.exceptions.RedisError:
        return  # hosted ones do not tell
    if policy != "noeviction":
        found = f"maxmemory-policy is {policy}: messages may be dropped when memory is short"
        advice = "Set maxmemory-policy noeviction in redis.conf."
        yield Finding("redis memory", State.WARNING, found, advice)


# -- disk and bucket ---------------------------------------------------------------------------------------------------


def _check_disk(settings: Settings) -> Iterator[Finding]:
    folder = nearest_folder(settings.data_dir)
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        advice = f"Give the user that runs the server the right to write {folder}, or set MEDSORA_DATA_DIR."
        yield Finding("disk", State.FAILING, f"{settings.data_dir} cannot be written", advice)
        return
    objects = objects_of(settings.model_copy(update={"storage_url": None}), "artifacts")
    free, needed = objects.free_bytes(), settings.min_free_bytes
    found = f"{free / 2**30:.1f} GiB are free for {settings.data_dir}"
    if free < needed:
        advice = (
            f"No job is taken below MEDSORA_MIN_FREE_BYTES ({needed}): delete videos, set MEDSORA_VIDEO_KEPT_S, or "
            "move the folder to a larger disk."
        )
        yield Finding("disk", State.FAILING, found, advice)
    elif free < 4 * needed:
        yield Finding("disk", State.WARNING, found, "Make room before jobs are refused: see MEDSORA_VIDEO_KEPT_S.")
    else:
        yield Finding("disk", State.OK, found)


def _check_storage(settings: Settings) -> Iterator[Finding]:
    if settings.storage_url is None:
        yield Finding("storage", State.OK, f"files are kept in {settings.data_dir}")
        return
    try:
        objects_of(settings, "artifacts").probe()
    except SettingsError as error:
        yield Finding("storage", State.FAILING, str(error), "Install what is missing, or unset MEDSORA_STORAGE_URL.")
    except (OSError, StorageFullError) as error:
        advice = "Correct the MEDSORA_S3_* settings, the store or its rights. Jobs wait meanwhile (docs/storage.md)."
        yield Finding("storage", State.FAILING, str(error), advice)
    else:
        yield Finding("storage", State.OK, f"{settings.storage_url} takes, and removes, files")


# -- model and device --------------------------------------------------------------------------------------------------


def _check_checkpoints(settings: Settings) -> Iterator[Finding]:
    for name in settings.checkpoints:
        part = f"checkpoint {Path(name).name}"
        try:
            directory = find_checkpoint(name)
            manifest = read_manifest(directory)
        except CheckpointError as error:
            advice = "Correct MEDSORA_CHECKPOINTS, or export or install the checkpoint again."
            yield Finding(part, State.FAILING, str(error), advice)
            continue
        bad = [
            file
            for file, record in sorted(manifest.files.items())
            if not (directory / file).is_file() or sha256_of(directory / file) != record.sha256
        ]
        if bad:
            found = f"missing or altered in {directory}: {', '.join(bad)}"
            yield Finding(part, State.FAILING, found, "Install or copy the checkpoint again.")
        else:
            yield Finding(part, State.OK, f"{manifest.name}: {len(manifest.files)} files are as its manifest has them")


def _check_device(settings: Settings) -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        found = "torch is not installed here: nothing for an API, but a worker cannot run"
        yield Finding("device", State.SKIPPED, found, "On machines with workers: pip install 'medsora[worker]'.")
        return
    import torch

    has_gpu = torch.cuda.is_available()
    wants_gpu = settings.device.startswith("cuda")
    has_driver = Path("/proc/driver/nvidia/version").exists()
    if not has_gpu:
        found = f"torch {torch.__version__} sees no GPU"
        if has_driver:
            advice = "The driver is there: install a CUDA build of torch, and let containers have the GPU."
            yield Finding("device", State.FAILING if wants_gpu else State.WARNING, found, advice)
        elif wants_gpu:
            advice = "Install the NVIDIA driver, or set MEDSORA_DEVICE=cpu."
            yield Finding("device", State.FAILING, f"{found}, and MEDSORA_DEVICE is {settings.device}", advice)
        else:
            yield Finding("device", State.OK, f"{found}: clips are sampled on the CPU")
        yield from _check_kernels(settings, has_gpu=False)
        return
    number = int(settings.device.partition(":")[2] or 0)
    if number >= torch.cuda.device_count():
        advice = f"Set MEDSORA_DEVICE to one of cuda:0 to cuda:{torch.cuda.device_count() - 1}."
        yield Finding("device", State.FAILING, f"there is no {settings.device}", advice)
        return
    free, total = torch.cuda.mem_get_info(number)
    name = torch.cuda.get_device_name(number)
    yield Finding("device", State.OK, f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    yield from _check_kernels(settings, has_gpu=True)


def _check_kernels(settings: Settings, *, has_gpu: bool) -> Iterator[Finding]:
    from medsora.ops.backends import INSTALL_KERNELS, kernels_problem

    problem = kernels_problem()
    is_asked_for = settings.backend == "mamba_ssm"
    if problem is None:
        yield Finding("kernels", State.OK, "mamba_ssm can be used")
    elif is_asked_for:
        advice = f"Set MEDSORA_BACKEND=auto, or on a machine with a GPU: {INSTALL_KERNELS}"
        yield Finding("kernels", State.FAILING, f"MEDSORA_BACKEND is mamba_ssm: {problem}", advice)
    elif has_gpu:
        yield Finding(
            "kernels", State.WARNING, f"{problem}", f"It works without, slower at long clips: {INSTALL_KERNELS}"
        )
    else:
        yield Finding("kernels", State.OK, "not needed on a CPU")


# -- access ------------------------------------------------------------------------------------------------------------


def _check_access(settings: Settings) -> Iterator[Finding]:
    from server.api.access import is_loopback

    is_public = not is_loopback(settings.host)
    if settings.keys == "off" and is_public:
        found = (
            f"MEDSORA_KEYS is off, and the API listens on {settings.host}: whoever reaches it may use and delete all"
        )
        advice = "Set MEDSORA_KEYS=required, unless a gateway lets in nobody else."
        yield Finding("access", State.WARNING, found, advice)
        return
    if settings.keys == "off" or (settings.keys == "auto" and not is_public):
        yield Finding("access", State.OK, f"MEDSORA_KEYS is {settings.keys}, the API listens on {settings.host}")
        return
    database = Database(settings.database_address)
    try:
        if database.is_sqlite and not Path(str(database.url.database)).exists():
            exists = False
        else:
            exists = KeyRepository(database).any_exists()
    except SQLAlchemyError:
        yield Finding("access", State.SKIPPED, "keys are in the database, which cannot be read", "See database.")
        return
    finally:
        database.close()
    if exists:
        yield Finding("access", State.OK, "callers need a key, and there are some")
    else:
        advice = "Make one: medsora-server keys create --tenant NAME"
        yield Finding("access", State.WARNING, "callers need a key, and there is none", advice)


def _first_line(error: Exception) -> str:
    origin = getattr(error, "orig", None) or error
    return (str(origin).strip() or type(origin).__name__).splitlines()[0]


_CHECKS: dict[str, Callable[[Settings], Iterator[Finding]]] = {
    "database": _check_database,
    "redis": _check_redis,
    "disk": _check_disk,
    "storage": _check_storage,
    "checkpoint": _check_checkpoints,
    "device": _check_device,
    "access": _check_access,
}
