"""Hand job ids to the broker, by task name. The message is only a hint that a row waits.

So a publish that fails is no failure of the request: the reaper publishes again. Publishing is tried once,
with short time limits, and in a thread of its own: a broker that is down or silent never holds up an answer.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery
from sqlalchemy.exc import SQLAlchemyError

__all__ = [
    "MOST_HINTS",
    "QUEUE_NAME",
    "TASK_NAME",
    "BackgroundPublisher",
    "JobQueue",
    "QueueError",
    "transport_options",
]

TASK_NAME = "medsora.generate_video"
QUEUE_NAME = "medsora.generate"
KEY_PREFIX = "vgen:"
VISIBILITY_TIMEOUT_S = 7200
_PUBLISH_TIMEOUT_S = 1.0
MOST_HINTS = 16
"""Messages that may wait. Whoever takes one does all the work that the table shows, so further ones say nothing new: a
message that waits after a job was committed is taken later, and its taker sees the job."""

logger = logging.getLogger(__name__)


class QueueError(Exception):
    """The broker cannot be reached or does not answer in time."""


def transport_options(*, socket_timeout_s: float, connect_timeout_s: float) -> dict[str, Any]:
    """Options of the Redis transport. The shortest visibility timeout of all users wins: one number, here."""
    return {
        # Above the hard time limit and a margin; duplicates are then rare, and harmless by the fencing token.
        "visibility_timeout": VISIBILITY_TIMEOUT_S,
        "unacked_restore_interval": 10,
        "unacked_restore_throttle": 1,
        # The default (None) hangs for ever on a connection whose other end is gone without a word.
        "socket_timeout": socket_timeout_s,
        "socket_connect_timeout": connect_timeout_s,
        "socket_keepalive": True,
        "health_check_interval": 5,
        "global_keyprefix": KEY_PREFIX,
        "queue_order_strategy": "priority",
    }


class JobQueue:
    """Publishing side of the broker. Not safe for concurrent use: one thread, one instance.

    Args:
        broker_url: Redis URL.
    """

    def __init__(self, broker_url: str) -> None:
        self._app = Celery("medsora-publisher", set_as_current=False)
        self._app.conf.update(
            broker_url=broker_url,
            broker_connection_timeout=_PUBLISH_TIMEOUT_S,
            broker_transport_options={
                **transport_options(socket_timeout_s=_PUBLISH_TIMEOUT_S, connect_timeout_s=_PUBLISH_TIMEOUT_S),
                "max_retries": 0,  # else opening a channel tries for ever, whatever `retry` says
            },
            visibility_timeout=VISIBILITY_TIMEOUT_S,
            task_serializer="json",
            accept_content=["json"],
            task_ignore_result=True,
            result_backend=None,
            task_send_sent_event=False,
            task_default_queue=QUEUE_NAME,
        )
        # A connection of our own: kombu's pools are shared by everybody in the process who uses the same URL.
        self._connection = self._app.connection_for_write()

    def publish(self, job_id: str, attempt: int) -> None:
        """Put one job id into the queue.

        Raises:
            QueueError: The broker did not take it.
        """
        try:
            self._app.send_task(
                TASK_NAME,
                args=[job_id],
                task_id=f"{job_id}:{attempt}",
                queue=QUEUE_NAME,
                producer=self._app.amqp.Producer(self._connection, auto_declare=False),
                retry=False,
                ignore_result=True,
            )
        except Exception as error:  # kombu lets through what redis and the socket raise
            raise self._failed("publishing", error) from error

    def publish_hints(self, jobs: Sequence[tuple[str, int]]) -> None:
        """Let the broker know of jobs (id, attempts so far) that are committed, by as many messages as are of use.

        Raises:
            QueueError: The broker did not take them.
        """
        room = MOST_HINTS - self.length()
        for job_id, attempt in jobs[: max(0, room)]:
            self.publish(job_id, attempt)

    def length(self) -> int:
        """Number of messages that no worker has taken yet.

        Raises:
            QueueError: The broker did not answer.
        """
        try:
            return int(self._connection.default_channel.queue_declare(QUEUE_NAME).message_count)
        except Exception as error:
            raise self._failed("asking for the length of the queue", error) from error

    def close(self) -> None:
        """Close the connection."""
        try:
            self._connection.close()
        except Exception:
            logger.debug("closing the broker connection failed", exc_info=True)

    def _failed(self, action: str, error: Exception) -> QueueError:
        # The connection may be dead without knowing it: begin with a new one next time.
        self.close()
        self._connection = self._app.connection_for_write()
        return QueueError(f"{action} failed: {type(error).__name__}: {error}")


class BackgroundPublisher:
    """A thread that lets the broker know of the jobs it is given, and forgets them where it cannot.

    Args:
        job_queue: Used by this thread alone.
        mark_published: Called with the ids that the broker took.
        capacity: Most ids that wait for the thread; further ones are left to the reaper.
    """

    def __init__(
        self, job_queue: JobQueue, mark_published: Callable[[Sequence[str]], None], *, capacity: int = 10_000
    ) -> None:
        self._job_queue = job_queue
        self._mark_published = mark_published
        self._pending: queue.Queue[str | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def submit(self, job_id: str) -> None:
        """Publish the first attempt of a job soon. Returns at once, never fails."""
        try:
            self._pending.put_nowait(job_id)
        except queue.Full:
            logger.warning("too many jobs wait to be published; the reaper will publish %s", job_id)

    def close(self, timeout_s: float = 2.0) -> None:
        """Publish what is pending, for at most ``timeout_s`` seconds, and stop."""
        try:
            self._pending.put_nowait(None)
        except queue.Full:
            return  # the thread is stuck on the broker; it ends with the process
        self._thread.join(timeout_s)

    def _run(self) -> None:
        stopping = False
        while not stopping:
            batch = [self._pending.get()]
            while not self._pending.empty():
                batch.append(self._pending.get())
            stopping = None in batch
            published = [job_id for job_id in batch if job_id is not None]
            try:
                self._job_queue.publish_hints([(job_id, 0) for job_id in published])
            except QueueError as error:
                logger.warning("%s; the reaper will publish %d jobs", error, len(published))
                continue
            try:
                self._mark_published(published)
            except SQLAlchemyError as error:
                logger.warning(
                    "not recorded that %d jobs were published, as they may be again: %s", len(published), error
                )
        self._job_queue.close()
