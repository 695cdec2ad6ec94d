"""A worker whose acknowledgement was lost takes no message, and so must connect anew."""

from typing import Any

import pytest
from celery.utils.timer2 import Timer
from celery.worker import state
from kombu import Connection, Exchange, Queue

from server.settings import Settings
from server.worker.broker_watch import BrokerWatch, LostAcknowledgementError, require_credit
from server.worker.celery_app import make_celery


class Consumer:
    """As much of Celery's consumer as the step sees."""

    def __init__(self, channel: Any) -> None:
        self.timer = Timer()
        self.task_consumer: Any = self
        self.channel = channel


@pytest.fixture
def channel():  # type: ignore[no-untyped-def]
    with Connection("memory://") as connection:
        channel = connection.channel()
        queue = Queue("videos", Exchange("videos"), routing_key="videos", channel=channel)
        queue.declare()
        producer = connection.Producer(channel)
        for number in range(2):
            producer.publish({"number": number}, exchange="videos", routing_key="videos")
        channel.basic_qos(prefetch_count=1)
        yield channel


def take(channel: Any) -> Any:
    message = channel.basic_get("videos")
    channel.qos.append(message, message.delivery_tag)  # as a consumer does, which basic_get without it does not
    return message


def test_a_message_whose_task_is_there_is_no_fault(channel: Any) -> None:
    require_credit(channel.qos, 0)
    message = take(channel)
    assert not channel.qos.can_consume()
    require_credit(channel.qos, 1)
    message.ack()
    channel.qos.ack(message.delivery_tag)
    require_credit(channel.qos, 0)


def test_a_message_without_a_task_is_a_lost_acknowledgement(channel: Any) -> None:
    take(channel)
    with pytest.raises(LostAcknowledgementError, match="1 messages count as taken, of which 0 are"):
        require_credit(channel.qos, 0)
    assert issubclass(LostAcknowledgementError, OSError), "one of the connection errors of every transport"


def test_of_two_places_one_is_enough_to_go_on(channel: Any) -> None:
    channel.basic_qos(prefetch_count=2)
    take(channel)
    require_credit(channel.qos, 0)
    take(channel)
    with pytest.raises(LostAcknowledgementError):
        require_credit(channel.qos, 1)


def test_it_looks_while_the_consumer_is_connected(channel: Any) -> None:
    consumer = Consumer(channel)
    watch = BrokerWatch(consumer)
    watch.start(consumer)
    assert len(consumer.timer.queue) == 1
    look = consumer.timer.queue[0].entry
    take(channel)
    assert not state.reserved_requests
    with pytest.raises(LostAcknowledgementError):
        look()
    watch.stop(consumer)
    assert all(scheduled.entry.canceled for scheduled in consumer.timer.queue)
    watch.stop(consumer)  # as after a start that failed


def test_before_there_is_a_consumer_of_tasks_it_is_still(channel: Any) -> None:
    consumer = Consumer(channel)
    consumer.task_consumer = None
    BrokerWatch(consumer)._look(consumer)


def test_every_worker_has_it() -> None:
    assert BrokerWatch in make_celery(Settings(redis_url="redis://host/0")).steps["consumer"]
