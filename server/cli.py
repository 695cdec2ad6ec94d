"""Console script ``medsora-server``: everything at once, or one part of it.

The parts are imported by the command that runs them, so that ``--help`` needs none of them.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from server.keys.cli import app as keys_app

if TYPE_CHECKING:
    from server.settings import Settings

__all__ = ["app", "main"]

app = typer.Typer(
    name="medsora-server",
    help="Serve synthetic medical videos over HTTP. Settings are MEDSORA_* environment variables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(keys_app, name="keys")

HostOption = Annotated[str | None, typer.Option(help="Address to listen on (MEDSORA_HOST, 127.0.0.1).")]
PortOption = Annotated[int | None, typer.Option(help="TCP port; 0 takes a free one (MEDSORA_PORT, 8000).")]
DataOption = Annotated[Path | None, typer.Option(help="Folder of all data (MEDSORA_DATA_DIR, ./medsora-data).")]
CheckpointOption = Annotated[
    list[str] | None,
    typer.Option(help="Checkpoint to serve: a shipped name or a folder; repeatable (MEDSORA_CHECKPOINTS)."),
]


@app.command()
def serve(
    host: HostOption = None, port: PortOption = None, data_dir: DataOption = None, checkpoint: CheckpointOption = None
) -> None:
    """Start everything: Redis (unless MEDSORA_REDIS_URL is set), worker, API and reaper. Ctrl-C stops it."""
    settings = _settings(host=host, port=port, data_dir=data_dir, checkpoints=tuple(checkpoint or ()) or None)
    from medsora.errors import CheckpointError
    from server.embedded import ServeError, Supervisor
    from server.jobs.database import DatabaseURLError
    from server.logs import configure_logging

    configure_logging(settings.log_level, settings.log_format, part="serve")
    try:
        sys.exit(Supervisor(settings).run())
    except (ServeError, CheckpointError, DatabaseURLError) as error:
        _fail(error)


@app.command()
def api(
    host: HostOption = None,
    port: PortOption = None,
    fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve HTTP. Needs MEDSORA_REDIS_URL, and workers elsewhere that share database and data folder."""
    settings = _settings(host=host, port=port)
    import math
    import socket
    from types import FrameType

    import uvicorn

    from medsora.errors import CheckpointError
    from server.app import create_app
    from server.logs import configure_logging
    from server.tracing import start_tracing, stop_tracing

    configure_logging(settings.log_level, settings.log_format, part="api")
    start_tracing("api")
    if fd is None and settings.keys == "auto":
        # Where it is not `serve` that runs this, a proxy may stand before it: then all the world is on loopback.
        settings = settings.model_copy(update={"keys": "required"})
    try:
        application = create_app(settings)
    except (CheckpointError, ValueError) as error:
        _fail(error)
    config = uvicorn.Config(
        application,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(5, math.ceil(settings.drain_s)),
        h11_max_incomplete_event_size=64 * 1024,
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # Streams of events have no end of their own: the server would wait for them, and then cut them off.
            application.state.end_streams()
            super().handle_exit(sig, frame)

    try:
        Server(config).run(sockets=None if fd is None else [socket.socket(fileno=fd)])
    finally:
        stop_tracing()


@app.command()
def worker() -> None:
    """Sample videos. Needs MEDSORA_REDIS_URL; shares database and data folder with the API."""
    settings = _settings()
    import os
    import warnings

    from medsora.threads import let_idle_threads_sleep

    let_idle_threads_sleep()

    from celery.platforms import SecurityWarning

    from server.settings import SettingsError
    from server.worker.celery_app import make_celery, worker_arguments
    from server.worker.compile_cache import keep_compiled_code
    from server.worker.signing import signer_of

    # Celery warns of root because pickled messages could run code; only JSON is accepted here.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    try:
        celery = make_celery(settings)
        signer_of(settings)  # whoever has set a certificate wants nothing that is not signed
        keep_compiled_code(settings.data_dir, os.environ)
    except SettingsError as error:
        _fail(error)
    celery.worker_main(worker_arguments())


@app.command()
def reaper() -> None:
    """Return jobs of lost workers to the queue, work off batches and datasets, send webhooks. Run one or more."""
    settings = _settings()
    import signal
    import threading

    from medsora.errors import CheckpointError
    from server.batch_runner import make_batch_runner
    from server.checkpoints import Catalogue
    from server.dataset_runner import make_dataset_runner
    from server.events.log import EventLog
    from server.files.store import FileStore
    from server.jobs.database import Database
    from server.jobs.queue import JobQueue
    from server.jobs.repository import JobRepository
    from server.jobs.schema import migrate
    from server.jobs.workers import WorkerRegistry
    from server.logs import configure_logging
    from server.objects import objects_of
    from server.reaper import Reaper
    from server.sealing import Sealer
    from server.settings import SettingsError
    from server.sources.repository import SourceRepository
    from server.storage import ArtifactStore
    from server.tracing import start_tracing, stop_tracing
    from server.webhooks.repository import WebhookRepository
    from server.webhooks.sender import WebhookSender

    configure_logging(settings.log_level, settings.log_format, part="reaper")
    start_tracing("reaper")
    try:
        queue, batch_queue, dataset_queue = (JobQueue(settings.broker_address()) for _ in range(3))
        catalogue = Catalogue.load(settings.checkpoints)
    except (SettingsError, CheckpointError) as error:
        _fail(error)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    database = Database(settings.database_address)
    migrate(database)
    repository = JobRepository(database, lease_s=settings.lease_s, max_attempts=settings.max_attempts)
    store = ArtifactStore(objects_of(settings, "artifacts"))
    batches = make_batch_runner(settings, database=database, catalogue=catalogue, queue=batch_queue)
    datasets = make_dataset_runner(settings, database=database, queue=dataset_queue)
    webhooks = WebhookRepository(database, Sealer(settings))
    threads = [
        threading.Thread(target=batches.run, args=(stop,), name="batches"),
        threading.Thread(target=datasets.run, args=(stop,), name="datasets"),
        threading.Thread(target=WebhookSender(settings, webhooks).run, args=(stop,), name="webhooks"),
    ]
    for thread in threads:
        thread.start()
    try:
        Reaper(
            settings,
            repository=repository,
            workers=WorkerRegistry(database, heartbeat_s=settings.worker_heartbeat_s),
            store=store,
            queue=queue,
            events=EventLog(database),
            sources=SourceRepository(database),
            source_store=FileStore(objects_of(settings, "sources")),
            webhooks=webhooks,
        ).run(stop)
    finally:
        stop.set()  # or, after an error, the process would go on with half of its work
        for thread in threads:
            thread.join()
        batch_queue.close()
        dataset_queue.close()
        queue.close()
        database.close()
        stop_tracing()


@app.command()
def health(
    part: Annotated[Literal["api", "worker", "reaper"], typer.Argument(help="Which part of this host to ask about.")],
) -> None:
    """Ask whether a part does its work; says what is wrong, and ends with status 1. For health checks."""
    settings = _settings()
    from server import healthcheck

    check = {
        "api": healthcheck.api_problem,
        "worker": healthcheck.worker_problem,
        "reaper": healthcheck.reaper_problem,
    }[part]
    problem = check(settings)
    if problem is not None:
        typer.echo(problem, err=True)
        raise typer.Exit(1)


@app.command("settings")
def print_settings(
    form: Annotated[
        Literal["markdown", "env"], typer.Option(help="A page, or lines for a file of environment variables.")
    ] = "markdown",
) -> None:
    """Print all settings with their defaults, bounds and meaning."""
    from server.settings_reference import env_lines, markdown_page

    typer.echo(markdown_page() if form == "markdown" else env_lines(), nl=False)


@app.command()
def doctor(
    data_dir: DataOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as failures.")] = False,
) -> None:
    """Check database, Redis, disk, bucket, checkpoints, GPU, kernels and keys; exit code 1 where one fails.

    Run it where, and as, the server runs: with the same MEDSORA_* variables, user and machine.
    """
    from server.doctor import Finding, State, examine, show_json, show_table
    from server.settings import SettingsError, load_settings

    try:
        findings = examine(load_settings(data_dir=data_dir))
    except SettingsError as error:
        findings = [
            Finding("settings", State.FAILING, str(error), "Correct these variables; nothing else was looked at.")
        ]
    (show_json if as_json else show_table)(findings)
    bad = {State.FAILING, State.WARNING} if strict else {State.FAILING}
    raise typer.Exit(1 if any(finding.state in bad for finding in findings) else 0)


@app.command()
def backup(folder: Annotated[Path, typer.Argument(help="New folder for it.")], data_dir: DataOption = None) -> None:
    """Copy database and files into a new folder, while the server runs; files are compared with their hashes."""
    settings = _settings(data_dir=data_dir)
    from server.backup import BackupError, make_backup

    try:
        summary = make_backup(settings, folder)
    except (BackupError, OSError) as error:
        _fail(error)
    typer.echo(summary.text)
    raise typer.Exit(1 if summary.damaged else 0)


@app.command()
def restore(folder: Annotated[Path, typer.Argument(help="A backup.")], data_dir: DataOption = None) -> None:
    """Put a backup into an empty data folder (and database, and bucket). No part of the server may run."""
    settings = _settings(data_dir=data_dir)
    from server.backup import BackupError, restore_backup

    try:
        summary = restore_backup(settings, folder)
    except (BackupError, OSError) as error:
        _fail(error)
    typer.echo(summary.text)


def _settings(**overrides: object) -> "Settings":
    from server.settings import SettingsError, load_settings

    try:
        return load_settings(**overrides)
    except SettingsError as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"medsora-server: {error}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
