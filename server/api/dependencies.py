"""What endpoints are given: one :class:`Services` a process, made when the application starts.

What only looks something up is a coroutine: of plain functions FastAPI calls each in a thread of its pool.
"""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from server.api.access import AccessControl, Caller, CallerDep, TenantDep, get_caller
from server.batches.service import BatchService
from server.checkpoints import Catalogue
from server.datasets.service import DatasetService
from server.events.follower import Follower
from server.events.log import EventLog
from server.files.service import FileService
from server.idempotency import IdempotentRequests
from server.jobs.database import Database
from server.jobs.queue import JobQueue
from server.jobs.repository import JobRepository
from server.jobs.service import JobService
from server.jobs.workers import WorkerRegistry
from server.keys.limits import TenantLimits
from server.keys.repository import KeyRepository
from server.observability import HttpMetrics
from server.settings import Settings
from server.sources.service import SourceService
from server.storage import ArtifactStore
from server.webhooks.service import WebhookService

__all__ = ["Caller", "CallerDep", "JobServiceDep", "Services", "ServicesDep", "TenantDep", "get_caller"]


@dataclass(frozen=True, kw_only=True)
class Services:
    """Everything that endpoints use."""

    settings: Settings
    database: Database
    catalogue: Catalogue
    store: ArtifactStore
    jobs: JobService
    sources: SourceService
    files: FileService
    batches: BatchService
    datasets: DatasetService
    events: EventLog
    follower: Follower
    webhooks: WebhookService
    repository: JobRepository
    keys: KeyRepository
    access: AccessControl
    limits: TenantLimits
    idempotent_requests: IdempotentRequests
    workers: WorkerRegistry
    probe_queue: JobQueue
    """Connection of the readiness check alone."""
    http_metrics: HttpMetrics


async def get_services(request: Request) -> Services:
    """The services of this process."""
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


async def get_job_service(services: ServicesDep) -> JobService:
    """The rules of jobs."""
    return services.jobs


JobServiceDep = Annotated[JobService, Depends(get_job_service)]
