"""Celery, set up so that the database row stays the truth and no job is lost with a process or a message.

Every setting here has been measured against killed workers, brokers and connections. Prefork with spawn: other
pools ignore time limits in silence, and CUDA does not survive a fork.
"""

import logging
import signal
from typing import Any

from celery import Celery
from celery.signals import setup_logging

from server.jobs.queue import QUEUE_NAME, VISIBILITY_TIMEOUT_S, transport_options
from server.logs import configure_logging
from server.settings import Settings, get_settings
from server.worker.broker_watch import BrokerWatch

__all__ = ["STOP_SIGNAL", "child_process_ids", "configure_worker_logging", "make_celery", "worker_arguments"]

STOP_SIGNAL = signal.SIGUSR2
"""Sent by the worker to its sampling processes when it begins to stop."""


def make_celery(settings: Settings) -> Celery:
    """The Celery application of a worker.

    Raises:
        SettingsError: No broker is set.
    """
    setup_logging.connect(configure_worker_logging)
    app = Celery("medsora", include=["server.worker.tasks"])
    app.conf.update(
        broker_url=settings.broker_address(),
        task_default_queue=QUEUE_NAME,
        # The message is acknowledged after the run, so nothing is reserved behind a long job.
        task_acks_late=True,
        # A message that comes back by itself has no cap of attempts; the reaper publishes again, and counts.
        task_reject_on_worker_lost=False,
        task_acks_on_failure=True,
        task_acks_on_timeout=True,
        worker_prefetch_multiplier=1,
        worker_concurrency=settings.worker_processes,
        worker_pool="prefork",
        worker_pool_start_method="spawn",
        # A sampling process ends itself when its start takes too long; this is for one that cannot.
        worker_proc_alive_timeout=settings.worker_start_limit_s + 60,
        worker_max_memory_per_child=settings.worker_max_memory_mib * 1024,
        # Of a task, which takes batch after batch for a while: the last of them gets the whole time, too.
        task_soft_time_limit=settings.turn_s + settings.job_time_limit_s * 9 // 10,
        task_time_limit=settings.turn_s + settings.job_time_limit_s,
        # True kills the running job when Redis restarts, and acknowledges it.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # None of Celery's own: it sleeps its whole time, whether anything runs or not. See server/worker/tasks.py.
        worker_soft_shutdown_timeout=0,
        # No result backend: it would be a second way in which Redis can stop a job.
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        accept_content=["json"],
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # What asks Redis on a dead connection waits that long, one after another.
        broker_transport_options=transport_options(socket_timeout_s=3, connect_timeout_s=3),
        visibility_timeout=VISIBILITY_TIMEOUT_S,
        worker_send_task_events=False,
        task_send_sent_event=False,
        worker_redirect_stdouts=False,
    )
    app.steps["consumer"].add(BrokerWatch)
    return app


def configure_worker_logging(**_: Any) -> None:
    """In place of Celery's own: in the worker, and in each sampling process, which are new interpreters."""
    settings = get_settings()
    configure_logging(settings.log_level, settings.log_format, part="worker")
    pool_logger = logging.getLogger("multiprocessing")  # billiard has given it a handler of its own
    pool_logger.handlers, pool_logger.propagate = [], True
    pool_logger.setLevel(logging.NOTSET)


def worker_arguments() -> list[str]:
    """Command line of the Celery worker, for ``Celery.worker_main``."""
    return [
        "--quiet",  # no banner; what happens is logged
        "worker",
        # Of what is said before configure_worker_logging sets level and form.
        "--loglevel=ERROR",
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
    ]


def child_process_ids(worker: Any) -> list[int]:
    """Process ids of a worker's sampling processes."""
    pool = getattr(getattr(worker, "pool", None), "_pool", None)
    return [process.pid for process in getattr(pool, "_pool", []) if process.pid is not None]
