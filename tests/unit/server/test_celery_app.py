"""Celery's settings, each of which guards against a measured loss; and the names on the wire."""

import subprocess
import sys

from server.jobs.queue import QUEUE_NAME, TASK_NAME, VISIBILITY_TIMEOUT_S
from server.settings import Settings
from server.worker.celery_app import make_celery, worker_arguments


def make():  # type: ignore[no-untyped-def]
    return make_celery(
        Settings(redis_url="redis://host/0", job_time_limit_s=1000, worker_processes=2, worker_start_limit_s=900)
    )


def test_settings_that_keep_jobs() -> None:
    conf = make().conf
    expected = {
        "task_acks_late": True,
        "task_reject_on_worker_lost": False,
        "task_acks_on_failure": True,
        "task_acks_on_timeout": True,
        "worker_prefetch_multiplier": 1,
        "worker_concurrency": 2,
        "worker_pool": "prefork",
        "worker_pool_start_method": "spawn",
        "worker_proc_alive_timeout": 960,
        "task_soft_time_limit": 960,  # and 60 s in which batches may begin
        "task_time_limit": 1060,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_soft_shutdown_timeout": 0,
        "task_ignore_result": True,
        "result_backend": None,
        "task_serializer": "json",
        "accept_content": ["json"],
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "visibility_timeout": 7200,
        "worker_send_task_events": False,
        "task_send_sent_event": False,
    }
    assert {name: conf[name] for name in expected} == expected
    assert conf.broker_transport_options == {
        "visibility_timeout": 7200,
        "unacked_restore_interval": 10,
        "unacked_restore_throttle": 1,
        "socket_timeout": 3,
        "socket_connect_timeout": 3,
        "socket_keepalive": True,
        "health_check_interval": 5,
        "global_keyprefix": "vgen:",
        "queue_order_strategy": "priority",
    }
    assert conf.broker_transport_options["visibility_timeout"] == VISIBILITY_TIMEOUT_S


def test_longest_job_ends_before_its_message_comes_back() -> None:
    limit = Settings.model_fields["job_time_limit_s"].metadata
    assert max(bound.le for bound in limit if hasattr(bound, "le")) < VISIBILITY_TIMEOUT_S


def test_worker_sends_no_chatter() -> None:
    arguments = worker_arguments()
    assert {"--without-gossip", "--without-mingle", "--without-heartbeat"} <= set(arguments)


def test_names_on_the_wire() -> None:
    app = make()
    app.loader.import_default_modules()
    assert TASK_NAME == "medsora.generate_video"
    assert TASK_NAME in app.tasks
    assert QUEUE_NAME == "medsora.generate"
    assert app.conf.task_default_queue == QUEUE_NAME


def test_the_parent_of_the_sampling_processes_loads_nothing_that_samples_or_encodes() -> None:
    code = "import sys, server.worker.tasks; sys.exit(bool({'torch', 'numpy', 'av', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_threads_of_a_sampling_process_take_short_turns() -> None:
    code = (
        "import sys, server.worker.tasks as tasks; tasks._get_runtime = lambda: None; tasks._on_process_init();"
        "sys.exit(sys.getswitchinterval() > 0.001)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
