"""A worker that would never hear the broker again connects anew.

Celery only logs a message whose acknowledgement failed (the connection died while the task ran). The message then
counts as unfinished for ever, takes the place of the next one, and the worker asks for none: nothing is read from the
dead connection either, so nobody notices that it is dead. The row of the job is safe; jobs to come would wait.
"""

from typing import Any

from celery import bootsteps
from celery.worker import state

__all__ = ["CHECK_S", "BrokerWatch", "LostAcknowledgementError", "require_credit"]

CHECK_S = 3.0
"""Seconds between two looks."""


class LostAcknowledgementError(ConnectionError):
    """An acknowledgement did not reach the broker. As a connection error it lets Celery connect anew."""


def require_credit(qos: Any, requests: int) -> None:
    """Compare the messages that the channel counts as taken with the tasks that there are.

    Args:
        qos: Of the channel (kombu's ``virtual.QoS``).
        requests: Tasks that were taken and are not finished.

    Raises:
        LostAcknowledgementError: No message may be taken, though fewer tasks than that are running or waiting.
    """
    if not qos.can_consume() and requests < qos.prefetch_count:
        raise LostAcknowledgementError(
            f"{qos.prefetch_count} messages count as taken, of which {requests} are: an acknowledgement was lost"
        )


class BrokerWatch(bootsteps.StartStopStep):  # type: ignore[misc]
    """Looks every few seconds, in the loop that also takes messages: so never between the two counts."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, parent: Any, **options: Any) -> None:
        self._timer: Any = None
        super().__init__(parent, **options)

    def start(self, parent: Any) -> None:
        """The consumer is connected."""
        self._timer = parent.timer.call_repeatedly(CHECK_S, self._look, (parent,))

    def stop(self, parent: Any) -> None:
        """The consumer ends, or connects anew."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, parent: Any) -> None:
        if parent.task_consumer is not None:
            require_credit(parent.task_consumer.channel.qos, len(state.reserved_requests))
