"""The Celery task and the life of a sampling process. No logic of its own.

The parent process samples nothing, so what that needs is loaded by the sampling processes alone.
"""

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from celery import shared_task
from celery.signals import (
    setup_logging,
    worker_init,
    worker_process_init,
    worker_process_shutdown,
    worker_shutting_down,
)

from medsora.threads import take_short_turns
from server.jobs.queue import TASK_NAME
from server.settings import get_settings
from server.tracing import start_tracing, stop_tracing
from server.worker.celery_app import STOP_SIGNAL, child_process_ids, configure_worker_logging

if TYPE_CHECKING:
    from server.worker.runtime import WorkerRuntime

__all__ = ["generate_video"]

logger = logging.getLogger(__name__)
_TELL_AGAIN_S = 0.2
_runtime: "WorkerRuntime | None" = None  # of this process; set before it gets its first task
_worker: Any = None  # Celery's worker object, in the parent process only


def _generate_video(job_id: str) -> None:
    """Make videos of waiting jobs; the id only says that there is work. Harmless to run twice, or for nothing."""
    from server.worker.generation import run_jobs

    if not run_jobs(_get_runtime()):
        logger.debug("no job waits any more: another worker has taken %s, or it was cancelled", job_id)


generate_video = shared_task(name=TASK_NAME)(_generate_video)


def _get_runtime() -> "WorkerRuntime":
    from server.worker.runtime import WorkerRuntime

    global _runtime
    if _runtime is None:
        _runtime = WorkerRuntime(get_settings())
        _runtime.start()
    return _runtime


def _on_process_init(**_: Any) -> None:
    start_tracing("worker")
    take_short_turns()
    try:
        _get_runtime()
    except Exception:
        # Celery would swallow it; the first task tries again and fails loudly.
        logger.exception("the sampling process could not be set up")


def _on_process_shutdown(**_: Any) -> None:
    if _runtime is not None:
        _runtime.close()
    stop_tracing()


def _on_worker_init(sender: Any, **_: Any) -> None:
    global _worker
    _worker = sender
    # Sampling processes inherit this: until they can hear the signal it must not end them, or new ones would start.
    signal.signal(STOP_SIGNAL, signal.SIG_IGN)


def _on_shutting_down(**_: Any) -> None:
    """Let running jobs be handed back at their next step, instead of waiting for their end."""
    threading.Thread(target=_tell_children_to_stop, name="stop", daemon=True).start()


def _tell_children_to_stop() -> None:
    while True:  # again and again, for those that are still starting, perhaps with a job waiting for them
        for process_id in child_process_ids(_worker):
            with suppress(ProcessLookupError):
                os.kill(process_id, STOP_SIGNAL)
        time.sleep(_TELL_AGAIN_S)


setup_logging.connect(configure_worker_logging)
worker_init.connect(_on_worker_init)
worker_process_init.connect(_on_process_init)
worker_process_shutdown.connect(_on_process_shutdown)
worker_shutting_down.connect(_on_shutting_down)
