"""The Celery task and the life of a sampling process. No logic of its own."""

import logging
import os
from typing import Any

from celery import shared_task
from celery.signals import worker_init, worker_process_init, worker_process_shutdown, worker_shutting_down

from server.jobs.queue import TASK_NAME
from server.settings import get_settings
from server.worker.celery_app import child_process_ids
from server.worker.runtime import STOP_SIGNAL, WorkerRuntime

__all__ = ["generate_video"]

logger = logging.getLogger(__name__)
_runtime: WorkerRuntime | None = None  # of this process; set before it gets its first task
_worker: Any = None  # Celery's worker object, in the parent process only


def _generate_video(job_id: str) -> None:
    """Make the video of a job. Harmless to run twice, or for a job that is gone."""
    from server.worker.generation import run_job

    run_job(_get_runtime(), job_id)


generate_video = shared_task(name=TASK_NAME)(_generate_video)


def _get_runtime() -> WorkerRuntime:
    global _runtime
    if _runtime is None:
        _runtime = WorkerRuntime(get_settings())
        _runtime.start()
    return _runtime


def _on_process_init(**_: Any) -> None:
    try:
        _get_runtime()
    except Exception:
        # Celery would swallow it; the first task tries again and fails loudly.
        logger.exception("the sampling process could not be set up")


def _on_process_shutdown(**_: Any) -> None:
    if _runtime is not None:
        _runtime.close()


def _on_worker_init(sender: Any, **_: Any) -> None:
    global _worker
    _worker = sender


def _on_shutting_down(**_: Any) -> None:
    """Let running jobs be handed back at their next step, instead of waiting for their end."""
    for process_id in child_process_ids(_worker):
        try:
            os.kill(process_id, STOP_SIGNAL)
        except ProcessLookupError:
            continue


worker_init.connect(_on_worker_init)
worker_process_init.connect(_on_process_init)
worker_process_shutdown.connect(_on_process_shutdown)
worker_shutting_down.connect(_on_shutting_down)
