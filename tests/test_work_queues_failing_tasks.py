"""Work queues: a task that makes trouble. It neither ends its worker, nor is lost, nor holds up
others."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import BasicProperties

from tests.scripts import (
    DONE,
    NEW_TASK,
    TASKS_WAITING,
    WORKER,
    LargeNumber,
    Scripts,
    another_user,
    consumer,
    limit_queue,
    put,
    received,
    size,
    take,
    tasks_of,
    worker_that,
)
from tools.broker import Broker, eventually


def test_a_task_that_is_no_text_is_done_like_any_other(scripts: Scripts) -> None:
    """Bytes that are no UTF-8 bring no worker down; their dots are seconds as well."""
    doing = consumer(scripts, WORKER)
    scripts.run(NEW_TASK, b"\xff\xfe.")
    doing.expect(DONE)
    assert doing.out.seen == [TASKS_WAITING, received("\udcff\udcfe."), DONE]


def test_a_task_that_fails_neither_ends_its_worker_nor_is_lost(
    broker: Broker, scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """Work that raises, even SystemExit, is one line on standard error. The tasks behind it are
    done, and the task is tried again, about once a second, with the properties that it had. But it
    names its sender no more, who is not the worker; it does not expire; and the queues that a CC
    header names, which got a copy when it was sent, get no other."""
    work = "{'two': float, 'exit': sys.exit}.get(text, str)(text)"
    failing = consumer(scripts, worker_that(WORKER, work, tmp_path))
    channel.queue_declare("audit", durable=True)
    its: dict[str, object] = {"delivery_mode": 2, "message_id": "its id", "expiration": "60000"}
    its |= {"user_id": "sender", "headers": {"a": 1, "CC": ["audit"]}}
    with (
        another_user(broker, scripts.amqp_url, "sender", write=".*") as url,
        closing(pika.BlockingConnection(pika.URLParameters(url))) as connection,
    ):
        put(connection.channel(), "task_queue", "two", "exit", **its)
    put(channel, "task_queue", "3", "4")
    told = " [!] 'two' failed: ValueError(\"could not convert string to float: 'two'\")"
    failing.expect_error(told, count=2)
    failing.expect_error(" [!] 'exit' failed: SystemExit('exit')", count=2)
    failing.expect(received("exit"), count=2)
    assert tasks_of(failing)[:6] == ["two", "exit", "3", "4", "two", "exit"]
    assert failing.out.seen.count(DONE) == 2
    assert failing.err.times[2] - failing.err.times[0] >= 2, "seconds: no tight loop"
    failing.stop()
    eventually(lambda: size(channel, "task_queue") == 2, "each is in its queue, once")
    kept, body = take(channel, "task_queue")
    assert body in (b"two", b"exit")
    assert vars(kept) == vars(
        BasicProperties(delivery_mode=2, message_id="its id", headers={"a": 1})
    )
    assert size(channel, "audit") == 2


@pytest.mark.parametrize("why", ["full queue", "no permission", "strange header"])
def test_a_failed_task_that_is_not_taken_back_holds_up_no_other(
    broker: Broker, scripts: Scripts, channel: BlockingChannel, tmp_path: Path, why: str
) -> None:
    """The worker says so, keeps the task unacknowledged, and does the others. When the worker ends,
    the task is in its queue."""
    channel.queue_declare("task_queue", durable=True)
    plain = BasicProperties(delivery_mode=2)
    channel.basic_publish("", "task_queue", b"two", LargeNumber() if "header" in why else plain)
    put(channel, "task_queue", "3", "4")
    gate = tmp_path / "gate"
    os.mkfifo(gate)  # to open it takes until we write to it
    work = f"int(text if text.isdigit() else open('{gate}').read())"
    copy = worker_that(WORKER, work, tmp_path)
    with another_user(broker, scripts.amqp_url, "reader", configure=".*", read=".*") as reader:
        failing = consumer(scripts, copy, amqp_url=reader if "permission" in why else None)
        failing.expect(received("two"))
        if "full" in why:
            limit_queue(broker, scripts.amqp_url, "task_queue", 2)
        gate.write_text("no number")
        failing.expect(DONE, count=2)
        put(channel, "task_queue", "last")
        failing.expect(received("last"))  # so those before it are acknowledged
        failing.stop()
    assert tasks_of(failing) == ["two", "3", "4", "last"]
    failed, kept = failing.err.seen
    assert failed.startswith(" [!] 'two' failed: ValueError(")
    assert kept.startswith(" [!] RabbitMQ does not take it back, so we keep it: ")
    eventually(lambda: size(channel, "task_queue") == 2, "what it kept and had in hand is back")
    assert take(channel, "task_queue")[1] == b"two"
