"""The published scripts and ours may stand on either end of each other's queues and exchanges.

The published scripts ask for quorum queues, so this holds where queues are quorum queues by
default. The test plays the part of a published script: with its declarations and its messages, as
they are in rabbitmq/rabbitmq-tutorials, python/, at commit 8aec600.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from tests.scripts import (
    EMIT_DIRECT,
    EMIT_LOG,
    EMIT_TOPIC,
    NEW_TASK,
    RECEIVE,
    RECEIVE_DIRECT,
    RECEIVE_LOGS,
    RECEIVE_TOPIC,
    RPC_CLIENT,
    RPC_SERVER,
    SEND,
    WORKER,
    Scripts,
    consumer,
    received,
    take,
)
from tools.broker import Broker


@pytest.fixture
def amqp_url(broker: Broker, record_property: Callable[[str, object], None]) -> Iterator[str]:
    """The URL of a new virtual host where queues are quorum queues by default."""
    record_property("broker", str(broker))
    if broker.version.startswith("3."):
        pytest.skip(f"RabbitMQ {broker.version} has no default for the type of queues")
    with broker.virtual_host(f"published-{os.getpid()}", default_queue_type="quorum") as url:
        yield url


@dataclass(frozen=True)
class Pair:
    """Two scripts, and how a message gets from one to the other."""

    producer: str
    consumer: str
    queue: str = ""  # or else:
    exchange: str = ""
    exchange_type: str = ""
    key: str = ""  # the routing key, and the binding key
    wants: tuple[str, ...] = ()  # the arguments of the consumer
    says: tuple[str, ...] = ()  # the arguments of the producer
    body: str = "Hello World!"
    shows: str = " [x] Hello World!"
    persistent: bool = False

    def declare(self, channel: BlockingChannel) -> str:
        """Declare what the published scripts declare; return the queue of their consumer."""
        if self.queue:
            quorum = {"x-queue-type": "quorum"}
            channel.queue_declare(queue=self.queue, durable=True, arguments=quorum)
            return self.queue
        channel.exchange_declare(exchange=self.exchange, exchange_type=self.exchange_type)
        queue = str(channel.queue_declare(queue="", exclusive=True).method.queue)
        channel.queue_bind(exchange=self.exchange, queue=queue, routing_key=self.key)
        return queue


PAIRS = [
    Pair(SEND, RECEIVE, queue="hello", shows=received("Hello World!")),
    Pair(
        NEW_TASK,
        WORKER,
        queue="task_queue",
        says=("a", "task"),
        body="a task",
        shows=received("a task"),
        persistent=True,
    ),
    Pair(
        EMIT_LOG,
        RECEIVE_LOGS,
        exchange="logs",
        exchange_type="fanout",
        body="info: Hello World!",
        shows=" [x] info: Hello World!",
    ),
    Pair(
        EMIT_DIRECT,
        RECEIVE_DIRECT,
        exchange="direct_logs",
        exchange_type="direct",
        key="info",
        wants=("info",),
        shows=" [x] info:Hello World!",
    ),
    Pair(
        EMIT_TOPIC,
        RECEIVE_TOPIC,
        exchange="topic_logs",
        exchange_type="topic",
        key="anonymous.info",
        wants=("*.info",),
        shows=" [x] anonymous.info:Hello World!",
    ),
]

each_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.producer)


@each_pair
def test_ours_receives_what_theirs_sends(
    scripts: Scripts, channel: BlockingChannel, pair: Pair
) -> None:
    """The published script is the producer, and has made its declarations before ours."""
    pair.declare(channel)
    ours = consumer(scripts, pair.consumer, *pair.wants)
    pair.declare(channel)
    properties = pika.BasicProperties(delivery_mode=2) if pair.persistent else None
    channel.basic_publish(pair.exchange, pair.queue or pair.key, pair.body.encode(), properties)
    ours.expect(pair.shows)


@each_pair
def test_theirs_receives_what_ours_sends(
    scripts: Scripts, channel: BlockingChannel, pair: Pair
) -> None:
    """The published script is the consumer, and ours has made its declarations before it."""
    scripts.run(pair.producer, *pair.says)
    queue = pair.declare(channel)
    scripts.run(pair.producer, *pair.says)
    _properties, body = take(channel, queue)
    assert body == pair.body.encode()


def test_our_server_answers_their_client(scripts: Scripts, channel: BlockingChannel) -> None:
    """Its request has an address for the answer and a correlation id, and no type."""
    consumer(scripts, RPC_SERVER)
    callback_queue = channel.queue_declare(queue="", exclusive=True).method.queue
    properties = pika.BasicProperties(reply_to=callback_queue, correlation_id="theirs")
    channel.basic_publish(exchange="", routing_key="rpc_queue", properties=properties, body=b"10")
    answer, body = take(channel, callback_queue)
    assert (answer.correlation_id, body) == ("theirs", b"55")


def test_their_server_answers_our_client(scripts: Scripts, channel: BlockingChannel) -> None:
    """Its answer has the correlation id of the request, and no type."""
    channel.queue_declare(queue="rpc_queue", durable=True, arguments={"x-queue-type": "quorum"})
    client = scripts.start(RPC_CLIENT)
    request, body = take(channel, "rpc_queue")
    assert body == b"30"
    properties = pika.BasicProperties(correlation_id=request.correlation_id)
    channel.basic_publish("", str(request.reply_to), b"832040", properties)
    client.expect(" [.] Got 832040")
