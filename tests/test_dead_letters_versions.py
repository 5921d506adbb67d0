"""Dead letters: what differs between the versions of RabbitMQ is as the lesson's table says."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from tests.scripts import FILE_WORKER, Scripts, consumer, listing, put, received, size, take
from tools import ROOT
from tools.broker import Broker, eventually, virtual_host_of


def table(version: str) -> dict[str, str]:
    """Return the column of the lesson's table for this version of RabbitMQ, by its rows."""
    lesson = (ROOT / "dead_letters/README.md").read_text(encoding="utf-8")
    lines = [line for line in lesson.splitlines() if line.startswith("|") and "---" not in line]
    heads, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert heads[1:] == ["3.10", "4.0", "4.3"]
    column = next((i for i, head in enumerate(heads) if i and version.startswith(head)), None)
    if column is None:
        pytest.skip(f"the table says nothing about RabbitMQ {version}")
    return {row[0]: row[column] for row in rows}


reject = BlockingChannel.basic_reject  # with requeue=True


def times_delivered(
    amqp_url: str, give_back: Callable[[BlockingChannel, int], object], **arguments: object
) -> int:
    """Return how often a task in a new queue is delivered and given back until it is a dead letter.

    30 means that it is still there.
    """
    with closing(pika.BlockingConnection(pika.URLParameters(amqp_url))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        declare_with_dead_letters(channel, "a queue", **arguments)
        channel.basic_publish("", "a queue", b"task", mandatory=True)
        for count in range(31):
            taker, method = connection.channel(), None
            while method is None and not size(channel, "a queue.dead"):
                method = taker.basic_get("a queue")[0]
            if method is None or count == 30:
                break
            give_back(taker, method.delivery_tag)
            if taker.is_open:
                taker.close()
        for each in ("a queue", "a queue.dead"):
            channel.queue_delete(each)
        return count


def declare_with_dead_letters(channel: BlockingChannel, name: str, **arguments: object) -> None:
    """Declare a quorum queue, and another one, to which its dead letters go."""
    to = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{name}.dead"}
    channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum"} | to | arguments)
    channel.queue_declare(f"{name}.dead", durable=True, arguments={"x-queue-type": "quorum"})


def test_what_counts_toward_the_delivery_limit_is_as_the_lesson_says(
    broker: Broker, amqp_url: str
) -> None:
    """Each row of its table that is about a call, a closed channel or a setting is tried."""
    column = table(broker.version)
    counts = {3: "counts", 30: "does not count"}
    limit = {"x-delivery-limit": 2}
    for row, give_back in (
        ("the worker calls `basic_reject(requeue=True)`", reject),
        ("the worker calls `basic_nack(requeue=True)`", BlockingChannel.basic_nack),
        ("the worker closes its channel or its connection", lambda channel, _: channel.close()),
    ):
        assert column.pop(row) == counts[times_delivered(amqp_url, give_back, **limit)], row
    gone = {21: "21 deliveries, then it is dropped", 30: "no limit"}
    assert column.pop("without `x-delivery-limit`") == gone[times_delivered(amqp_url, reject)]
    gone = {1: "dropped the first time it comes back", 30: "no limit"}
    none = {"x-delivery-limit": -1}
    assert column.pop("`x-delivery-limit: -1`") == gone[times_delivered(amqp_url, reject, **none)]
    assert {*column} == {
        "the worker is killed",
        "the worker is stopped with Ctrl+C",
        "RabbitMQ is restarted",
        "a task with old `x-death` headers expires in `tasks.retry`",
        "delayed retries by RabbitMQ itself (`x-delayed-retry-type`)",
    }, "these are tried below"


@pytest.mark.parametrize(("policy", "argument"), [(1, 1_000_000), (1_000_000, 1)])
def test_rabbitmq_takes_the_smaller_of_policy_and_argument(
    broker: Broker, channel: BlockingChannel, amqp_url: str, policy: int, argument: int
) -> None:
    """So a policy can make the numbers smaller that stand in code, and never larger."""

    def apply(name: str) -> None:
        rule = {"pattern": "^a queue$", "definition": {name: policy}, "apply-to": "queues"}
        broker.api("PUT", f"policies/{virtual_host_of(amqp_url)}/numbers", rule)

    apply("delivery-limit")
    assert times_delivered(amqp_url, reject, **{"x-delivery-limit": argument}) == 2
    apply("message-ttl")
    declare_with_dead_letters(channel, "a queue", **{"x-message-ttl": argument})
    put(channel, "a queue", "task")
    eventually(lambda: size(channel, "a queue.dead") == 1, "it expires in a millisecond")


def test_a_worker_that_goes_away_counts_as_the_lesson_says(
    broker: Broker, scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """A task has no more than three workers: those that are stopped politely count, too."""
    column = table(broker.version)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # to open it takes until somebody writes to it
    for row, how in (
        ("the worker is killed", signal.SIGKILL),
        ("the worker is stopped with Ctrl+C", signal.SIGINT),
    ):
        assert column[row] == "counts"
        for count in range(3):
            doing = consumer(scripts, FILE_WORKER)
            if count == 0:
                put(channel, "tasks", str(fifo))
            doing.expect(received(str(fifo), redelivered=count > 0))
            doing.stop(how)
        eventually(lambda: size(channel, "tasks.parked") == 1, "it is parked")
        assert listing(scripts)[1:] == ["     T RabbitMQ: delivery_limit"]
        channel.queue_purge("tasks.parked")


def test_a_restart_of_the_broker_counts_as_the_lesson_says(
    own_broker: Broker, amqp_url: str
) -> None:
    """A task that a worker has comes back then, and is a dead letter if it may not."""
    assert table(own_broker.version)["RabbitMQ is restarted"] == "counts"
    url = pika.URLParameters(amqp_url)
    channel = pika.BlockingConnection(url).channel()
    declare_with_dead_letters(channel, "a queue", **{"x-delivery-limit": 0})
    put(channel, "a queue", "held", "waiting")
    assert eventually(lambda: channel.basic_get("a queue")[0], "a task")
    own_broker.stop()
    own_broker.start()
    channel = pika.BlockingConnection(url).channel()
    assert take(channel, "a queue.dead")[1] == b"held"
    assert take(channel, "a queue")[1] == b"waiting"


def test_a_task_with_old_headers_fares_as_the_lesson_says(
    broker: Broker, scripts: Scripts, channel: BlockingChannel
) -> None:
    """That is why parked.py removes what RabbitMQ has written before it sends a task back."""
    doing = consumer(scripts, FILE_WORKER)
    death = {"queue": "tasks", "reason": "delivery_limit", "count": 1, "exchange": ""}
    old = {"x-death": [death | {"routing-keys": ["tasks"]}]}
    put(channel, "tasks.retry", "old", headers=old)
    put(channel, "tasks.retry", "new")
    doing.expect(received("new"))
    fate = "moves to `tasks`" if received("old") in doing.out.seen else "is dropped"
    row = "a task with old `x-death` headers expires in `tasks.retry`"
    assert table(broker.version)[row] == fate


def test_delayed_retries_exist_where_the_lesson_says(
    broker: Broker, channel: BlockingChannel
) -> None:
    """RabbitMQ 4.3 keeps a returned task back for a while, if it is told to; older ones do not."""
    arguments = {"x-delayed-retry-type": "all", "x-delayed-retry-min": 2000}
    channel.confirm_delivery()
    channel.queue_declare("delayed", durable=True, arguments={"x-queue-type": "quorum"} | arguments)
    channel.basic_publish("", "delayed", b"task")
    method = eventually(lambda: channel.basic_get("delayed")[0], "the task")
    channel.basic_nack(method.delivery_tag, requeue=True)
    begin = time.monotonic()
    eventually(lambda: channel.basic_get("delayed")[0], "the task is back")
    delayed = time.monotonic() - begin >= 1.9
    row = "delayed retries by RabbitMQ itself (`x-delayed-retry-type`)"
    assert table(broker.version)[row] == ("yes" if delayed else "no, the setting has no effect")
