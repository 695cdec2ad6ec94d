"""The HTTP application: puts the parts together and nothing else."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import Depends, FastAPI

import medsora
from server.api import batches as batches_api
from server.api import datasets as datasets_api
from server.api import events as events_api
from server.api import files as files_api
from server.api import health, live, models, playground, usage, videos
from server.api import webhooks as webhooks_api
from server.api.access import AccessControl, get_caller
from server.api.dependencies import Services
from server.api.handlers import add_exception_handlers
from server.api.idempotency import IdempotencyMiddleware
from server.api.openapi import error_responses, install_openapi, operation_id
from server.api.uploads import UPLOAD_OVERHEAD_BYTES
from server.batches.repository import BatchRepository
from server.batches.service import BatchService
from server.checkpoints import Catalogue
from server.datasets.files import DatasetFiles
from server.datasets.repository import DatasetRepository
from server.datasets.service import DatasetService
from server.events.follower import Follower
from server.events.log import EventLog
from server.files.repository import FileRepository
from server.files.service import FileService
from server.files.store import FileStore
from server.idempotency import IdempotentRequests
from server.jobs.database import Database
from server.jobs.queue import BackgroundPublisher, JobQueue
from server.jobs.repository import JobRepository
from server.jobs.schema import migrate
from server.jobs.service import JobService
from server.jobs.workers import WorkerRegistry
from server.keys.limits import Limits, RequestLimiter, TenantLimits
from server.keys.repository import KeyRepository
from server.objects import objects_of
from server.observability import HttpMetrics, RequestMiddleware
from server.sealing import Sealer
from server.settings import Settings
from server.sources.repository import SourceRepository
from server.sources.service import SourceService
from server.storage import ArtifactStore
from server.webhooks.repository import WebhookRepository
from server.webhooks.service import WebhookService
from server.webhooks.signature import seal_secret

__all__ = ["create_app"]

logger = logging.getLogger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """Build the application. Nothing is opened before it starts.

    Raises:
        CheckpointError: A served checkpoint is missing or its manifest is damaged.
        SettingsError: No broker is set.
    """
    catalogue = Catalogue.load(settings.checkpoints)
    broker_url = settings.broker_address()
    http_metrics = HttpMetrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = Database(settings.database_address)
        limits = Limits.of(settings)
        migrate(database)
        keys = KeyRepository(database)
        repository = JobRepository(
            database, lease_s=settings.lease_s, max_attempts=settings.max_attempts, limits=limits
        )
        store = ArtifactStore(objects_of(settings, "artifacts"))
        files = FileRepository(database)
        sealer = Sealer(settings)
        sealer.load()
        publisher = BackgroundPublisher(JobQueue(broker_url), repository.mark_published)
        probe_queue = JobQueue(broker_url)
        jobs = JobService(
            repository,
            catalogue,
            store,
            publish=publisher.submit,
            max_queued=settings.max_queued_jobs,
            min_free_bytes=settings.min_free_bytes,
            seal=partial(seal_secret, sealer),
            private_hosts=settings.webhook_private_hosts,
        )
        events = EventLog(database)
        follower = Follower(
            events, repository, interval_s=settings.events_interval_s, max_streams=settings.max_event_streams
        )
        file_service = FileService(
            files, FileStore(objects_of(settings, "files")), min_free_bytes=settings.min_free_bytes
        )
        app.state.services = Services(
            settings=settings,
            database=database,
            catalogue=catalogue,
            store=store,
            jobs=jobs,
            sources=SourceService(
                SourceRepository(database),
                FileStore(objects_of(settings, "sources")),
                jobs=jobs,
                files=file_service,
                artifacts=store,
                max_bytes=settings.max_body_bytes,
            ),
            files=file_service,
            batches=BatchService(
                BatchRepository(database, lease_s=settings.lease_s, limits=limits),
                files,
                max_active=settings.max_active_batches,
            ),
            datasets=DatasetService(
                DatasetRepository(database, lease_s=settings.lease_s, limits=limits),
                DatasetFiles(objects_of(settings, "datasets")),
                jobs=jobs,
                catalogue=catalogue,
                store=store,
                max_active=settings.max_active_datasets,
                min_free_bytes=settings.min_free_bytes,
            ),
            events=events,
            follower=follower,
            webhooks=WebhookService(WebhookRepository(database, sealer), private_hosts=settings.webhook_private_hosts),
            repository=repository,
            keys=keys,
            access=AccessControl(keys, RequestLimiter(database, limits), settings),
            limits=TenantLimits(database, limits),
            idempotent_requests=IdempotentRequests(database, sealer),
            workers=WorkerRegistry(database, heartbeat_s=settings.worker_heartbeat_s),
            probe_queue=probe_queue,
            http_metrics=http_metrics,
        )
        if app.state.services.access.needs_key() and not keys.any_exists():
            logger.warning("callers need a key, and there is none yet: make one with `medsora-server keys create`")
        http_metrics.start(database)
        loop = asyncio.get_running_loop()
        app.state.end_streams = lambda: loop.call_soon_threadsafe(follower.close)
        try:
            yield
        finally:
            await follower.stop()
            publisher.close()
            probe_queue.close()
            await asyncio.to_thread(http_metrics.close)
            database.close()

    app = FastAPI(
        title="MedSora Server",
        version=medsora.__version__,
        summary="Synthetic medical videos on request. Research only, not for diagnosis.",
        lifespan=lifespan,
        docs_url=None,  # the framework's pages load scripts from elsewhere; ours is part of the playground
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=operation_id,
    )
    app.state.end_streams = lambda: None  # called by whoever stops the process; before it has started there are none
    add_exception_handlers(app)
    app.add_middleware(IdempotencyMiddleware, spool_dir=settings.data_dir)
    app.add_middleware(
        RequestMiddleware,
        max_body_bytes=settings.max_body_bytes,
        metrics=http_metrics,
        body_limits={"/v1/files": settings.max_file_bytes + UPLOAD_OVERHEAD_BYTES},
    )
    for part in (events_api, videos, live, files_api, batches_api, datasets_api, webhooks_api, models, usage):
        app.include_router(part.router, dependencies=[Depends(get_caller)], responses=error_responses(401, 403, 429))
    app.include_router(health.router)
    if settings.playground:
        app.include_router(playground.make_router())
    labels = [label.name for label in catalogue.default.manifest.labels]
    install_openapi(app, labels=labels, models=list(catalogue.names))
    return app
