"""/health/live, /health/ready and /metrics, for machines that watch."""

import logging
import threading
from collections.abc import Callable, Iterable

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from sqlalchemy.exc import SQLAlchemyError

from server.api.dependencies import Services, ServicesDep
from server.errors import error_body, without_folders
from server.jobs.measures import JOB_MEASURES, zeros
from server.jobs.model import JobStatus
from server.jobs.queue import QueueError
from server.jobs.workers import WorkerRecord
from server.measures import Sums, read_measures
from server.objects import StorageUnavailableError
from server.observability import HTTP_SECONDS
from server.webhooks.repository import DELIVERIES

__all__ = ["router"]

router = APIRouter(tags=["health"])
logger = logging.getLogger(__name__)
MEASURES = (*JOB_MEASURES, DELIVERIES, HTTP_SECONDS)
_probe_lock = threading.Lock()


@router.get("/health/live")
def live() -> dict[str, str]:
    """Whether this process answers. Looks at nothing else."""
    return {"status": "live"}


@router.get("/health/ready", responses={503: {"description": "A part is missing; the answer says which and why."}})
def ready(services: ServicesDep) -> JSONResponse:
    """Whether a video that is asked for now would be made: database, disk, broker and a worker."""
    checks: dict[str, dict[str, str]] = {}
    for name, check in (
        ("database", _check_database),
        ("disk", _check_disk),
        ("broker", _check_broker),
        ("worker", _check_worker),
    ):
        problem = check(services)
        checks[name] = {"status": "ok"} if problem is None else {"status": "failing", "reason": problem}
    reasons = [f"{name}: {check['reason']}" for name, check in checks.items() if "reason" in check]
    if not reasons:
        return JSONResponse({"status": "ready", "checks": checks})
    error = error_body("The server is not ready. " + " ".join(reasons), kind="server_error", code="not_ready")
    return JSONResponse({"status": "not_ready", "checks": checks, **error}, status_code=503)


def _check_database(services: Services) -> str | None:
    try:
        services.repository.count_waiting()
    except SQLAlchemyError as error:
        return f"The job database does not answer: {type(error).__name__}."
    return None


def _check_disk(services: Services) -> str | None:
    free, needed = services.store.free_bytes(), services.settings.min_free_bytes
    if free < needed:
        return f"{free} bytes are free, {needed} are needed."
    try:
        next(services.store.objects.list("probe/"), None)  # of a folder nothing; a bucket must answer
    except StorageUnavailableError as error:
        logger.warning("%s", error)
        return "The file store does not answer."
    return None


def _check_broker(services: Services) -> str | None:
    if not _probe_lock.acquire(timeout=5.0):
        return "The broker does not answer."
    try:
        services.probe_queue.length()
    except QueueError as error:
        return f"The broker does not answer: {without_folders(str(error)).rstrip('.')}."
    finally:
        _probe_lock.release()
    return None


def _check_worker(services: Services) -> str | None:
    try:
        workers = services.workers.alive()
    except SQLAlchemyError:
        return "Unknown, the job database does not answer."
    wanted = set(services.catalogue.names)
    able = {model for worker in workers if worker.problem is None for model in worker.models}
    if wanted <= able:
        return None
    problems = sorted({worker.problem for worker in workers if worker.problem is not None})
    if problems:
        return " ".join(problems)
    missing = ", ".join(sorted(wanted - able))
    return f"No live worker offers {missing}." if workers else "No worker is alive (yet)."


@router.get("/metrics", response_class=Response)
def metrics(services: ServicesDep) -> Response:
    """Figures in Prometheus' text format.

    All is read from the database, so every API process tells the same; durations of requests to other API processes
    are there a few seconds later.
    """
    services.http_metrics.flush()
    measured = read_measures(services.database, MEASURES)
    for model in services.catalogue.names:
        for measure, labels in zeros(model):
            measured[measure.name].setdefault(labels, Sums())
    live = services.repository.count_live()
    bulk = {"batch": services.batches.unfinished_clips(), "dataset": services.datasets.unfinished_clips()}
    models = sorted({*services.catalogue.names, *(model for model, _ in live)})
    workers = services.workers.alive()
    registry = CollectorRegistry()
    registry.register(_Collected(lambda: _live_metrics(live, models)))
    registry.register(_Collected(lambda: _bulk_metrics(bulk)))
    registry.register(_Collected(lambda: _measured_metrics(measured)))
    registry.register(_Collected(lambda: _worker_metrics(workers)))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Collected:
    """Adapter from a function to what a registry wants."""

    def __init__(self, function: Callable[[], Iterable[Metric]]) -> None:
        self._function = function

    def collect(self) -> Iterable[Metric]:
        return self._function()


def _live_metrics(live: dict[tuple[str, JobStatus], int], models: list[str]) -> Iterable[Metric]:
    waiting = GaugeMetricFamily("medsora_num_requests_waiting", "Jobs in the queue.", labels=["model"])
    running = GaugeMetricFamily("medsora_num_requests_running", "Jobs that a worker holds.", labels=["model"])
    for model in models:
        waiting.add_metric([model], live.get((model, JobStatus.QUEUED), 0))
        running.add_metric([model], live.get((model, JobStatus.RUNNING), 0))
    return [waiting, running]


def _bulk_metrics(bulk: dict[str, int]) -> Iterable[Metric]:
    unfinished = GaugeMetricFamily(
        "medsora_num_bulk_clips_unfinished",
        "Clips that batches and datasets are still to give, most of which have no job yet.",
        labels=["kind"],
    )
    for kind, count in bulk.items():
        unfinished.add_metric([kind], count)
    return [unfinished]


def _measured_metrics(measured: dict[str, dict[tuple[str, ...], Sums]]) -> Iterable[Metric]:
    for measure in MEASURES:
        histogram = HistogramMetricFamily(measure.name, measure.about, labels=measure.labels)
        counter = CounterMetricFamily(measure.name, measure.about, labels=measure.labels)
        for labels, sums in measured[measure.name].items():
            if measure.edges:
                histogram.add_metric(labels, sums.cumulative(measure), sum_value=sums.total)
            else:
                counter.add_metric(labels, sums.total)
        yield histogram if measure.edges else counter


def _worker_metrics(workers: list[WorkerRecord]) -> Iterable[Metric]:
    up = GaugeMetricFamily(
        "medsora_worker_up", "1 for a live sampling process that can generate, else 0.", labels=["worker"]
    )
    memory = GaugeMetricFamily("medsora_worker_resident_bytes", "Host memory of a sampling process.", labels=["worker"])
    warm_up = GaugeMetricFamily(
        "medsora_worker_warm_up_seconds",
        "Seconds that a sampling process took to compile and warm up.",
        labels=["worker", "model", "batch_size"],
    )
    gpu = GaugeMetricFamily(
        "medsora_gpu_peak_memory_bytes",
        "Most memory of its GPU that a sampling process has had for tensors at once.",
        labels=["worker"],
    )
    for worker in workers:
        if worker.gpu_peak_bytes is not None:
            gpu.add_metric([worker.id], worker.gpu_peak_bytes)
        up.add_metric([worker.id], 1.0 if worker.problem is None else 0.0)
        memory.add_metric([worker.id], worker.rss_bytes)
        for model, by_batch_size in worker.warm_up_s.items():
            for batch_size, seconds in by_batch_size.items():
                warm_up.add_metric([worker.id, model, batch_size], seconds)
    return [up, memory, warm_up, gpu]
