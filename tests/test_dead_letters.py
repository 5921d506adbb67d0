"""Dead letters: a task that fails is tried again, and then parked. That it waits for three seconds,
that others are done meanwhile, and that one which kills its workers is parked, is tested by playing
the lesson."""

from __future__ import annotations

import os
import re
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import BasicProperties

from tests.scripts import (
    DONE,
    FILE_WORKER,
    NEW_FILE,
    PARKED,
    TASKS_WAITING,
    LargeNumber,
    Scripts,
    another_user,
    consumer,
    enoent,
    listing,
    put,
    received,
    size,
)
from tools.broker import Broker, eventually, virtual_host_of

WRITTEN = re.compile(
    "failures|x-death|x-(delivery|acquired)-count|x-(first|last)-death-(queue|reason|exchange)"
)


def properties(**more: object) -> dict[str, Any]:
    """Return all properties that a task can have."""
    own_headers = {"mine": 1, "x-mine": ["a", {"b": None}], "日本": b"\xff", b"\xff": "no text"}
    like_added = {"failures_allowed": 1, "x-delivery-": 2, "x-first-death-": 3}
    return {
        "content_type": "text/plain",
        "content_encoding": "utf-8",
        "headers": own_headers | like_added,
        "delivery_mode": 2,
        "priority": 3,
        "correlation_id": "c",
        "reply_to": "r",
        "message_id": "m",
        "timestamp": 1700000000,
        "type": "t",
        "app_id": "a",
        "cluster_id": "c",
    } | more


def look(channel: BlockingChannel, queue: str) -> list[tuple[bytes, BasicProperties]]:
    """Return bodies and properties of all tasks in a queue, and leave them there."""
    other = channel.connection.channel()
    got = [other.basic_get(queue) for _ in range(size(channel, queue))]
    other.close()
    return [(body or b"", its or BasicProperties()) for _, its, body in got]


def without(written: re.Pattern[str], its: BasicProperties) -> dict[str, Any]:
    """Return properties without the headers that were added on the way."""
    headers = (its.headers or {}).items()
    kept = {k: v for k, v in headers if not (isinstance(k, str) and written.fullmatch(k))}
    return vars(its) | {"headers": kept}


def test_a_task_stays_as_it_was(broker: Broker, scripts: Scripts, channel: BlockingChannel) -> None:
    """When it is tried again, when it is parked, and when it is sent back, also if RabbitMQ has
    parked it. A header says when and why each try failed, until it is sent back.

    Gone are its expiration, because it waits for a human for as long as it takes; its sender,
    whose name RabbitMQ accepts from nobody else; and the headers CC and BCC, which name more
    queues: they got their copy when the task was sent."""
    doing = consumer(scripts, FILE_WORKER, "--tries", "2")
    channel.queue_declare("audit", durable=True)
    bodies = [b"missing", b"", b"\xff\xfe", b"a\0b", "日本".encode(), b"m" * 100_000]
    gone = {"expiration": "60000", "user_id": "sender"}
    every = properties(**gone)
    every["headers"] |= {"CC": ["audit"]}
    with (
        another_user(broker, scripts.amqp_url, "sender", write=".*") as url,
        closing(pika.BlockingConnection(pika.URLParameters(url))) as connection,
    ):
        for body in bodies:
            put(connection.channel(), "tasks", os.fsdecode(body), **every)
        last = re.compile(r" \[!\] .+ failed \(2 of 2\) and is in tasks.parked now: .+")
        doing.expect_error(last, count=len(bodies), timeout=30)
        doing.stop()
        put(connection.channel(), "tasks.parked", "by RabbitMQ", **properties(**gone))
    assert size(channel, "audit") == len(bodies)
    kept = vars(BasicProperties(**properties()))
    parked = dict(look(channel, "tasks.parked"))
    assert sorted(parked) == sorted([*bodies, b"by RabbitMQ"])
    del parked[b"by RabbitMQ"]
    for its in parked.values():
        assert without(WRITTEN, its) == kept
        times = [time.strptime(f[:25], "%Y-%m-%d %H:%M:%S%z") for f in its.headers["failures"]]
        assert times == sorted(times)
        assert len(times) == 2
    assert [f[26:] for f in parked[b"missing"].headers["failures"]] == [enoent("missing")] * 2

    listing(scripts)  # RabbitMQ counts this in more headers
    assert listing(scripts, "--send-back").count("     sent back") == len(bodies) + 1
    assert (size(channel, "tasks.parked"), size(channel, "audit")) == (0, len(bodies))
    sent_back = look(channel, "tasks")
    assert sorted(body for body, _ in sent_back) == sorted([*bodies, b"by RabbitMQ"])
    counted = re.compile("x-delivery-count")  # RabbitMQ 3.10 adds this at once
    assert all(without(counted, its) == kept for _, its in sent_back)


def test_no_task_brings_a_worker_down(scripts: Scripts, channel: BlockingChannel) -> None:
    """Whatever its header claims about its failures. parked.py shows it."""
    doing = consumer(scripts, FILE_WORKER, "--tries", "1")
    for lie in (5, "text", [1], {"a": 1}, None):
        put(channel, "tasks", "liar", headers={"failures": lie})
    eventually(lambda: size(channel, "tasks.parked") == 5, "all are parked")
    assert len(listing(scripts)) == 5 + 5 + 4
    assert doing.out.seen.count(TASKS_WAITING) == 1


def test_a_task_that_expires_is_parked(scripts: Scripts, channel: BlockingChannel) -> None:
    """It has waited too long for a worker. It does not expire once more where it is parked."""
    consumer(scripts, FILE_WORKER, "--tries=100").stop()
    put(channel, "tasks", "late", expiration="1")
    eventually(lambda: size(channel, "tasks.parked") == 1, "it is parked")
    assert listing(scripts) == [" [x] 'late'", "     T RabbitMQ: expired"]
    ((_body, its),) = look(channel, "tasks.parked")
    assert its.expiration is None


@pytest.mark.parametrize("why", ["full queue", "no permission", "strange header"])
def test_a_failed_task_that_is_not_taken_is_parked_all_the_same(
    broker: Broker, scripts: Scripts, channel: BlockingChannel, why: str
) -> None:
    """The queue for retries is full, the worker may not write, or pika cannot write a header: the
    task is in tasks.parked, its reason is printed, and the tasks behind it are done."""
    consumer(scripts, FILE_WORKER).stop()  # which declares the queues
    if "full" in why:
        policy = {"pattern": "tasks.retry", "definition": {"max-length": 1}}
        broker.api("PUT", f"policies/{virtual_host_of(scripts.amqp_url)}/full", policy)
        for _ in range(3):
            channel.basic_publish("", "tasks.retry", b"full", BasicProperties(expiration="600000"))
    channel.basic_publish("", "tasks", b"missing", LargeNumber() if "header" in why else None)
    put(channel, "tasks", "LICENSE")
    with another_user(broker, scripts.amqp_url, "reader", configure=".*", read=".*") as reader:
        url = reader if "permission" in why else None
        doing = consumer(scripts, FILE_WORKER, amqp_url=url)
        doing.expect(DONE)
        eventually(lambda: size(channel, "tasks.parked") == 1, "the task is parked")
        doing.stop()
    assert enoent("missing") in doing.err.seen[-1]
    reason = enoent("missing") if "full" in why else "RabbitMQ: rejected"
    assert listing(scripts) == [" [x] 'missing'", f"     T {reason}"]


def test_a_file_name_need_not_be_text(scripts: Scripts, tmp_path: Path) -> None:
    """A name that is not UTF-8 is shown with escapes, and the work gets the name as it is."""
    name = os.fsencode(tmp_path) + b"/\xff\xfe.txt"
    with open(name, "w") as file:
        file.write("two words")
    doing = consumer(scripts, FILE_WORKER)
    scripts.run(NEW_FILE, name)
    doing.expect(DONE)
    assert doing.out.seen == [TASKS_WAITING, received(os.fsdecode(name)), " [.] 2 words", DONE]


def test_without_a_worker_there_are_no_queues(scripts: Scripts) -> None:
    """The other scripts say so in one line each."""
    sent = scripts.run(NEW_FILE, "a.txt", status=1)
    assert sent.err.all() == [" [!] There is no queue 'tasks': start a worker"]
    (line,) = scripts.run(PARKED, status=1).err.all()
    assert line.startswith(" [!] (404, \"NOT_FOUND - no queue 'tasks.parked'")
