"""Dead letters: a task that fails is tried again, and then parked."""

from __future__ import annotations

import os
import queue
import random
import re
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError
from pika.spec import BasicProperties

from tests.proxy import ACK, PUBLISH, Proxy
from tests.scripts import DONE, RECEIVED, Crew, Script, Scripts, another_user
from tools import ROOT
from tools.broker import Broker, eventually, virtual_host_of

WORKER = "dead_letters/worker.py"
WAITING = " [*] Waiting for tasks. To exit press CTRL+C"
DELAY = 3  # seconds between two tries
WORK = '    with open(text) as file:\n        print(f" [.] {len(file.read().split())} words")\n'
ADDED = {"failures", "x-death", "x-delivery-count", "x-acquired-count"}
ADDED |= {"x-first-death-queue", "x-first-death-reason", "x-first-death-exchange"}
ADDED |= {"x-last-death-queue", "x-last-death-reason", "x-last-death-exchange"}


def worker(
    scripts: Scripts,
    *options: str,
    script: str | Path = WORKER,
    amqp_url: str | None = None,
) -> Script:
    """Start a worker and wait until it waits for tasks."""
    started = scripts.start(script, *options, amqp_url=amqp_url)
    started.expect(WAITING)
    return started


def worker_that(work: str, folder: Path) -> Path:
    """Write a copy of the worker with another line of work, and return its path."""
    text = (ROOT / WORKER).read_text(encoding="utf-8")
    assert text.count(WORK) == 1
    path = folder / "worker.py"
    path.write_text(text.replace(WORK, f"    {work}\n"), encoding="utf-8")
    return path


def received(task: object, redelivered: bool = False) -> str:
    return f" [x] Received '{task}'" + (" (redelivered)" if redelivered else "")


def enoent(task: object) -> str:
    return f"FileNotFoundError: [Errno 2] No such file or directory: '{task}'"


def failed(task: object, count: int, tries: int = 3, reason: str = "") -> str:
    where = "tasks.retry" if count < tries else "tasks.parked"
    reason = reason or enoent(task)
    return f" [!] '{task}' failed ({count} of {tries}) and is in {where} now: {reason}"


def put(channel: BlockingChannel, *tasks: object) -> None:
    """Put tasks into the queue, as new_task.py does, and faster."""
    channel.confirm_delivery()
    for task in tasks:
        body = task if isinstance(task, bytes) else str(task).encode()
        channel.basic_publish("", "tasks", body, BasicProperties(delivery_mode=2), mandatory=True)


def size(channel: BlockingChannel, queue: str) -> int:
    """Return how many tasks are ready in a queue."""
    return int(channel.queue_declare(queue, passive=True).method.message_count)


def parked(channel: BlockingChannel) -> list[tuple[bytes, BasicProperties]]:
    """Take all tasks out of the queue of parked tasks."""
    found: list[tuple[bytes, BasicProperties]] = []
    while True:
        method, properties, body = channel.basic_get("tasks.parked", auto_ack=True)
        if method is None:
            return found
        found.append((body or b"", properties or BasicProperties()))


def failures_of(properties: BasicProperties) -> list[str]:
    """Return why the tries of a parked task failed."""
    return list((properties.headers or {}).get("failures", []))


def listing(scripts: Scripts, *options: str) -> list[str]:
    """Return what parked.py prints, with T for every time."""
    lines = scripts.run("dead_letters/parked.py", *options).out.all()
    return [re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+00:00", "T", line) for line in lines]


def test_a_failed_task_is_tried_again_later_and_the_others_are_done_meanwhile(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """It waits for three seconds in a queue of its own, and not at the head of the others."""
    late, good = tmp_path / "late.txt", tmp_path / "good.txt"
    good.write_text("two words")
    doing = worker(scripts)
    begin = time.monotonic()
    for task in (late, good):
        scripts.run("dead_letters/new_task.py", str(task))
    doing.expect(DONE)
    doing.expect_error(failed(late, 2))
    late.write_text("and these are five words")
    doing.expect(DONE, count=2)
    assert doing.err.seen == [failed(late, 1), failed(late, 2)]
    assert doing.out.seen[1:] == [
        received(late),
        *(received(good), " [.] 2 words", DONE),
        received(late),
        *(received(late), " [.] 5 words", DONE),
    ]
    assert doing.err.time_of(failed(late, 2)) - begin >= DELAY
    assert doing.out.times[-1] - begin >= 2 * DELAY
    assert [size(channel, queue) for queue in ("tasks", "tasks.retry", "tasks.parked")] == [0, 0, 0]


def everything() -> dict[str, Any]:
    """Return all properties that a task can have."""
    own_headers = {"mine": 1, "x-mine": ["a", {"b": None}], "日本": b"\xff", b"\xff": "no text"}
    like_added = {"failures_allowed": 1, "x-delivery-": 2, "x-first-death-": 3}
    return {
        "content_type": "text/plain",
        "content_encoding": "utf-8",
        "headers": own_headers | like_added,
        "delivery_mode": 2,
        "priority": 3,
        "expiration": "60000",
        "correlation_id": "c",
        "reply_to": "r",
        "message_id": "m",
        "timestamp": 1700000000,
        "type": "t",
        "user_id": "guest",
        "app_id": "a",
        "cluster_id": "c",
    }


def own(properties: BasicProperties) -> dict[str, Any]:
    """Return properties without the headers that were added on the way."""
    headers = {k: v for k, v in (properties.headers or {}).items() if k not in ADDED}
    return vars(properties) | {"headers": headers}


def kept() -> dict[str, Any]:
    """Return all properties that a task keeps when it is sent on."""
    return vars(BasicProperties(**everything())) | {"expiration": None, "user_id": None}


def test_after_three_tries_a_task_is_parked_as_it_was(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """Its body and properties are unchanged, and a header says when and why each try failed.

    Only its expiration and the name of its sender are gone. No task brings the worker down,
    whatever its bytes are and whatever its headers claim.
    """
    doing = worker(scripts)
    bodies = [b"missing", b"", b"\xff\xfe", b"a\0b", "日本".encode(), b"m" * 100_000]
    channel.confirm_delivery()
    for body in bodies:
        channel.basic_publish("", "tasks", body, BasicProperties(**everything()), mandatory=True)
    for lie in (5, "text", [1], {"a": 1}, None):
        channel.basic_publish("", "tasks", b"liar", BasicProperties(headers={"failures": lie}))
    eventually(lambda: size(channel, "tasks.parked") == 11, "all are parked", timeout=30)
    assert len(listing(scripts)) == 11 + 11 * 3
    found = parked(channel)
    assert [body for body, _ in found].count(b"liar") == 5
    rest = [(body, properties) for body, properties in found if body != b"liar"]
    assert sorted(body for body, _ in rest) == sorted(bodies)
    for _, properties in rest:
        assert own(properties) == kept()
        times = [time.strptime(f[:25], "%Y-%m-%d %H:%M:%S%z") for f in failures_of(properties)]
        assert len(times) == 3
        assert times == sorted(times)
    assert [f[26:] for f in failures_of(dict(rest)[b"missing"])] == [enoent("missing")] * 3
    assert doing.process.poll() is None
    assert doing.out.seen.count(WAITING) == 1


def test_a_task_with_an_expiration_does_not_expire_where_it_is_parked(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """It waits for a human for as long as it takes, even if it is parked after its first try."""
    doing = worker(scripts, "--tries", "1")
    short = BasicProperties(expiration="500")
    channel.basic_publish("", "tasks", b"missing", short)
    doing.expect_error(failed("missing", 1, 1))
    time.sleep(1)
    assert [(body, p.expiration) for body, p in parked(channel)] == [(b"missing", None)]


def test_a_task_may_name_its_sender(
    broker: Broker, scripts: Scripts, channel: BlockingChannel
) -> None:
    """RabbitMQ checks that a message names the user who sends it. Neither the worker nor parked.py
    is that user, and both send it on all the same."""
    doing = worker(scripts, "--tries", "1")
    with (
        another_user(broker, scripts.amqp_url, "sender", write=".*") as url,
        closing(pika.BlockingConnection(pika.URLParameters(url))) as connection,
    ):
        sender = connection.channel()
        sender.confirm_delivery()
        for where in ("tasks", "tasks.parked"):  # as if RabbitMQ had parked the other one
            sender.basic_publish("", where, b"missing", BasicProperties(user_id="sender"))
    doing.expect_error(failed("missing", 1, 1))
    doing.stop()
    assert listing(scripts, "--send-back").count("     sent back") == 2
    assert [size(channel, queue) for queue in ("tasks", "tasks.parked")] == [2, 0]


class LargeNumber(BasicProperties):
    """Properties with a header that other clients can send: pika reads it, but cannot write it."""

    def encode(self) -> list[bytes]:
        """Return the bytes: pika writes an integer, and this makes it a float, 1e300."""
        pieces: list[bytes] = super().encode()  # type: ignore[no-untyped-call]
        integer, number = struct.pack(">q", 2**62), struct.pack(">d", 1e300)
        return [b"".join(pieces).replace(b"\x04sizel" + integer, b"\x04sized" + number)]


@pytest.mark.parametrize("why", ["full queue", "no permission", "strange header"])
def test_a_failed_task_that_is_not_taken_is_parked_all_the_same(
    broker: Broker, scripts: Scripts, channel: BlockingChannel, why: str
) -> None:
    """The queue for retries is full, the worker may not write, or pika cannot write a header: the
    task is in tasks.parked, its reason is printed, and the tasks behind it are done."""
    worker(scripts).stop()  # which declares the queues
    if "full" in why:
        policy = {"pattern": "tasks.retry", "definition": {"max-length": 1}}
        broker.api("PUT", f"policies/{virtual_host_of(scripts.amqp_url)}/full", policy)
        channel.queue_bind("tasks.retry", "amq.direct")
        for _ in range(3):
            channel.basic_publish("", "tasks.retry", b"full", BasicProperties(expiration="600000"))
    strange = LargeNumber(headers={"size": 2**62})  # type: ignore[no-untyped-call]
    channel.basic_publish("", "tasks", b"missing", strange if "header" in why else None)
    put(channel, "LICENSE")
    with another_user(broker, scripts.amqp_url, "reader", configure=".*", read=".*") as reader:
        doing = worker(scripts, amqp_url=reader if "permission" in why else None)
        doing.expect(DONE)
        eventually(lambda: size(channel, "tasks.parked") == 1, "the task is parked")
        doing.stop()
    assert enoent("missing") in doing.err.seen[-1]
    shown = listing(scripts)
    assert shown[0] == " [x] 'missing'"
    assert (
        shown[1] == f"     T {enoent('missing')}" if "full" in why else "     T RabbitMQ: rejected"
    )


def test_a_failed_task_is_sent_to_its_queues_alone(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """A CC header names more queues, which got a copy when the task was sent. They get no other."""
    doing = worker(scripts, "--tries", "2")
    channel.queue_declare("audit", durable=True)
    order = BasicProperties(headers={"CC": ["audit"], "a": 1})
    channel.basic_publish("", "tasks", b"missing", order)
    doing.expect_error(failed("missing", 2, 2))
    assert size(channel, "audit") == 1
    ((_body, properties),) = parked(channel)
    assert own(properties)["headers"] == {"a": 1}


def test_sending_back_goes_on_after_a_task_that_cannot_be_sent(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """It stays parked, and the one behind it is sent back. The status says that not all were."""
    worker(scripts).stop()
    channel.basic_publish("", "tasks.parked", b"strange", LargeNumber(headers={"size": 2**62}))  # type: ignore[no-untyped-call]
    channel.basic_publish("", "tasks.parked", b"good")
    sender = scripts.run("dead_letters/parked.py", "--send-back", status=1)
    assert sender.err.all()[-1] == " [!] 1 of 2 tasks are sent back"
    assert [size(channel, queue) for queue in ("tasks", "tasks.parked")] == [1, 1]


def test_a_file_name_need_not_be_text(scripts: Scripts, tmp_path: Path) -> None:
    """A name that is not UTF-8 is shown with escapes, and the work gets the name as it is."""
    name = os.fsencode(tmp_path) + b"/\xff\xfe.txt"
    with open(name, "w") as file:
        file.write("two words")
    doing = worker(scripts)
    scripts.run("dead_letters/new_task.py", name)
    doing.expect(DONE)
    shown = repr(name.decode(errors="surrogateescape"))[1:-1]
    assert doing.out.seen == [WAITING, received(shown), " [.] 2 words", DONE]


def test_a_number_of_tries_that_makes_no_sense_is_refused(scripts: Scripts) -> None:
    """--tries takes 1 to 100. Anything else is a usage error."""
    running = [scripts.start(WORKER, f"--tries={n}") for n in ("1", "100")]
    for refused in [scripts.start(WORKER, f"--tries={n}") for n in ("0", "-1", "101", "many")]:
        assert refused.wait() == 2
        assert refused.err.seen[0].startswith("usage: worker.py ")
        assert refused.err.seen[-1].startswith("worker.py: error: argument --tries: invalid")
    for accepted in running:
        accepted.expect(WAITING)


@pytest.mark.parametrize("tries", [1, 2])
def test_the_number_of_tries_is_an_option(
    scripts: Scripts, channel: BlockingChannel, tries: int
) -> None:
    """--tries says how often a task is tried before it is parked."""
    doing = worker(scripts, "--tries", str(tries))
    put(channel, "missing")
    doing.expect_error(failed("missing", tries, tries))
    assert listing(scripts) == [" [x] 'missing'", *[f"     T {enoent('missing')}"] * tries]
    assert doing.out.seen == [WAITING, *[received("missing")] * tries]


def test_a_task_that_kills_its_worker_is_parked(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """RabbitMQ parks it when it has killed three workers, and the one behind it is done.

    Sent back when the cause is mended, it is a new task, which may fail and be tried again.
    """
    deadly = worker_that("os.kill(os.getpid(), 9)", tmp_path)
    task = tmp_path / "task.txt"
    first = worker(scripts, script=deadly)
    put(channel, task)
    assert first.wait() == -9
    for _ in range(2):
        again = scripts.start(deadly)
        assert again.wait() == -9
        assert again.out.all() == [WAITING, received(task, redelivered=True)]
    doing = worker(scripts)
    eventually(lambda: size(channel, "tasks.parked") == 1, "it is parked")
    good = tmp_path / "good.txt"
    good.write_text("word")
    put(channel, good)
    doing.expect(DONE)
    assert doing.out.seen == [WAITING, received(good), " [.] 1 words", DONE]

    assert listing(scripts, "--send-back") == [
        f" [x] '{task}'",
        "     T RabbitMQ: delivery_limit",
        "     sent back",
    ]
    doing.expect_error(failed(task, 2))
    task.write_text("it is here now")
    doing.expect(DONE, count=2)
    assert size(channel, "tasks.parked") == 0


@contextmanager
def without_confirms(amqp_url: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Give the URL of a proxy that drops each confirm, and a function that waits for the first.

    When that has come, and three heartbeats after it, nothing must have been acknowledged.
    """
    confirms: list[int] = []
    heartbeats: list[int] = []  # since the confirm
    acknowledgements: list[int] = []

    def watch(index: int, to_broker: bool) -> bool:
        if index == ACK:
            (acknowledgements if to_broker else confirms).append(index)
        elif to_broker and index == 0 and confirms:
            heartbeats.append(index)
        return index != ACK or to_broker

    def wait_for_one() -> None:
        eventually(lambda: confirms, "RabbitMQ confirms that the task is stored")
        eventually(lambda: len(heartbeats) >= 3, "the script lives on")
        assert acknowledgements == []

    with closing(Proxy(amqp_url, watch)) as proxy:
        yield f"{proxy.url}?heartbeat=1", wait_for_one


def test_a_worker_takes_a_failed_task_away_once_it_is_stored_elsewhere(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """It waits for the confirm, and acknowledges only then. Killed before, it leaves the task in
    both queues."""
    with without_confirms(scripts.amqp_url) as (url, wait_for_one):
        doing = worker(scripts, "--tries", "1", amqp_url=url)
        put(channel, "missing")
        wait_for_one()
        doing.kill()
    eventually(lambda: size(channel, "tasks") == 1, "the task is back")
    assert size(channel, "tasks.parked") == 1


def test_sending_back_takes_a_parked_task_away_once_it_is_stored_elsewhere(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """The same for parked.py."""
    worker(scripts).stop()
    channel.confirm_delivery()
    channel.basic_publish("", "tasks.parked", b"task", mandatory=True)
    with without_confirms(scripts.amqp_url) as (url, wait_for_one):
        sender = scripts.start("dead_letters/parked.py", "--send-back", amqp_url=url)
        wait_for_one()
        sender.kill()
    eventually(lambda: size(channel, "tasks.parked") == 1, "the task is back")
    assert size(channel, "tasks") == 1


def test_a_task_is_not_lost_in_a_queue_that_is_gone(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """Somebody deletes the queue to which a task is sent: it stays where it is.

    The worker then declares the queue again.
    """
    doing = worker(scripts)
    channel.queue_delete("tasks.retry")
    put(channel, "missing")
    doing.expect_error(" [!] 1 unroutable message(s) returned; trying again every second")
    doing.expect_error(failed("missing", 3))
    assert [size(channel, queue) for queue in ("tasks", "tasks.retry", "tasks.parked")] == [0, 0, 1]
    doing.stop()
    channel.queue_delete("tasks")
    sender = scripts.run("dead_letters/parked.py", "--send-back", status=1)
    assert sender.err.all() == [" [!] 1 unroutable message(s) returned"]
    eventually(lambda: size(channel, "tasks.parked") == 1, "the task is back")


def test_without_a_confirm_the_producers_give_up(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """After ten seconds: a queue that has no majority, for example, accepts no task."""
    worker(scripts).stop()
    channel.confirm_delivery()
    channel.basic_publish("", "tasks.parked", b"task", mandatory=True)
    with closing(Proxy(scripts.amqp_url, lambda index, _to_broker: index != ACK)) as proxy:
        begin = time.monotonic()
        producer = scripts.start("dead_letters/new_task.py", "a task", amqp_url=proxy.url)
        sender = scripts.start("dead_letters/parked.py", "--send-back", amqp_url=proxy.url)
        for script in (producer, sender):
            assert script.wait() == 1
            assert script.err.times[0] - begin >= 10
    unknown = " [!] No confirm within 10 s: nobody knows if the task is stored"
    assert (producer.out.seen, producer.err.seen) == ([], [unknown])
    both = " [!] No confirm within 10 s: the task is still parked, maybe also sent"
    assert (sender.out.seen, sender.err.seen) == ([" [x] 'task'"], [both])
    eventually(lambda: size(channel, "tasks.parked") == 1, "the task is back")


@pytest.mark.parametrize(("moment", "copies"), [(PUBLISH, 1), (ACK, 2)], ids=["publish", "ack"])
def test_a_worker_that_dies_between_two_queues_loses_nothing(
    scripts: Scripts, channel: BlockingChannel, moment: int, copies: int
) -> None:
    """Killed before a failed task is stored elsewhere, or before it is taken away: it is there."""

    def watch(index: int, to_broker: bool) -> bool:
        if index != moment or not to_broker:
            return True
        doing.process.kill()
        return False

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        doing = worker(scripts, "--tries", "1", amqp_url=proxy.url)
        put(channel, "missing")
        doing.wait()
    eventually(lambda: size(channel, "tasks") == 1, "the task is back")
    assert size(channel, "tasks.parked") == copies - 1
    worker(scripts, "--tries", "1").expect_error(failed("missing", 1, 1))
    assert [body for body, _ in parked(channel)] == [b"missing"] * copies


def test_listing_parked_tasks_changes_nothing(scripts: Scripts, channel: BlockingChannel) -> None:
    """However often one looks, all tasks are there afterwards, if perhaps in another order.

    Each look is a delivery of each task. By default, RabbitMQ 4 would drop them after 21.
    """
    doing = worker(scripts, "--tries", "1")
    put(channel, *(f"task {n}" for n in range(40)))
    doing.expect_error(failed("task 39", 1, 1))
    tasks = [f"task {n}" for n in range(40)]
    expected = [line for t in tasks for line in (f" [x] '{t}'", f"     T {enoent(t)}")]
    assert listing(scripts) == expected
    for _ in range(22):  # as parked.py does, but faster
        look = channel.connection.channel()
        assert all(look.basic_get("tasks.parked")[0] for _ in range(5))
        look.close()
    eventually(lambda: size(channel, "tasks.parked") == 40, "all are back")
    assert sorted(listing(scripts)) == sorted(expected)


@pytest.mark.parametrize(("moment", "copies"), [(PUBLISH, 3), (ACK, 4)], ids=["publish", "ack"])
def test_sending_back_loses_nothing_when_it_is_killed(
    scripts: Scripts, channel: BlockingChannel, moment: int, copies: int
) -> None:
    """Killed at its second task, it has sent one back, and the rest is parked or in both."""
    doing = worker(scripts, "--tries", "1")
    put(channel, *(f"task {n}" for n in range(3)))
    doing.expect_error(failed("task 2", 1, 1))
    doing.stop()
    seen = 0

    def watch(index: int, to_broker: bool) -> bool:
        nonlocal seen
        seen += index == moment and to_broker
        if seen < 2:
            return True
        sender.process.kill()
        return False

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        sender = scripts.start("dead_letters/parked.py", "--send-back", amqp_url=proxy.url)
        assert sender.wait() == -9
    eventually(lambda: size(channel, "tasks.parked") == 2, "the rest is parked")
    assert size(channel, "tasks") == copies - 2
    listing(scripts, "--send-back")
    assert size(channel, "tasks") == copies
    properties = channel.basic_get("tasks")[1]
    assert properties
    assert not own(properties)["headers"]
    assert failures_of(properties) == []  # the count starts anew


def test_sending_back_removes_what_was_added_and_nothing_else(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """Whatever the names of the other headers are."""
    doing = worker(scripts, "--tries", "2")
    channel.basic_publish("", "tasks", b"missing", BasicProperties(**everything()))
    doing.expect_error(failed("missing", 2, 2))
    doing.stop()
    listing(scripts)  # RabbitMQ counts this in more headers
    listing(scripts, "--send-back")
    sent = channel.basic_get("tasks")[1]
    assert sent
    if sent.headers.get("x-delivery-count") == 0:  # RabbitMQ 3.10 adds this at once
        del sent.headers["x-delivery-count"]
    assert vars(sent) == kept()


def test_a_dead_letter_waits_for_a_queue_that_is_gone(
    own_broker: Broker, scripts: Scripts, channel: BlockingChannel
) -> None:
    """RabbitMQ keeps it until the other queue is there again and has stored it."""
    name = "rabbit, dead_letter_worker_publisher_confirm_timeout"  # how often it tries
    usual = f"{{ok, Usual}} = application:get_env({name})"
    usually = own_broker.rabbitmqctl("eval", f"{usual}, application:set_env({name}, 500), Usual.")
    try:
        worker(scripts).stop()
        channel.queue_delete("tasks")
        channel.confirm_delivery()
        channel.basic_publish("", "tasks.retry", b"missing", mandatory=True)
        eventually(lambda: size(channel, "tasks.retry") == 0, "it has expired")
        worker(scripts).expect(received("missing"))
    finally:
        own_broker.rabbitmqctl("eval", f"application:set_env({name}, {usually}).")


def test_without_a_worker_there_are_no_queues(scripts: Scripts) -> None:
    """The other scripts say so in one line each."""
    sent = scripts.run("dead_letters/new_task.py", "a.txt", status=1)
    assert sent.err.all() == [" [!] There is no queue 'tasks': start a worker"]
    listed = scripts.run("dead_letters/parked.py", status=1)
    assert len(listed.err.all()) == 1
    assert listed.err.seen[0].startswith(" [!] (404, \"NOT_FOUND - no queue 'tasks.parked'")


# --- What differs between the versions ---


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
        count = 0
        while count < 30:
            taker = connection.channel()
            method = None
            while method is None and not size(channel, "a queue.dead"):
                method = taker.basic_get("a queue")[0]
            if method is None:
                break
            give_back(taker, method.delivery_tag)
            if taker.is_open:
                taker.close()
            count += 1
        for each in ("a queue", "a queue.dead"):
            channel.queue_delete(each)
        return count


def declare_with_dead_letters(channel: BlockingChannel, name: str, **arguments: object) -> None:
    """Declare a quorum queue, and another one, to which its dead letters go."""
    to = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{name}.dead"}
    channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum"} | to | arguments)
    channel.queue_declare(f"{name}.dead", durable=True, arguments={"x-queue-type": "quorum"})


def reject(channel: BlockingChannel, tag: int) -> None:
    channel.basic_reject(tag, requeue=True)


def nack(channel: BlockingChannel, tag: int) -> None:
    channel.basic_nack(tag, requeue=True)


def leave(channel: BlockingChannel, _tag: int) -> None:
    channel.close()


def test_what_counts_toward_the_delivery_limit_is_as_the_lesson_says(
    broker: Broker, amqp_url: str
) -> None:
    """Each row of its table that is about a call, a closed channel or a setting is tried."""
    column = table(broker.version)
    counts = {3: "counts", 30: "does not count"}
    limit = {"x-delivery-limit": 2}
    for row, give_back in (
        ("the worker calls `basic_reject(requeue=True)`", reject),
        ("the worker calls `basic_nack(requeue=True)`", nack),
        ("the worker closes its channel or its connection", leave),
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
            doing = worker(scripts)
            if count == 0:
                put(channel, fifo)
            doing.expect(received(fifo, redelivered=count > 0))
            doing.stop(how)
        eventually(lambda: size(channel, "tasks.parked") == 1, "it is parked")
        assert listing(scripts)[1:] == ["     T RabbitMQ: delivery_limit"]
        parked(channel)


def test_a_restart_of_the_broker_counts_as_the_lesson_says(own_broker: Broker) -> None:
    """A task that a worker has comes back then, and is a dead letter if it may not."""
    assert table(own_broker.version)["RabbitMQ is restarted"] == "counts"
    url = pika.URLParameters(own_broker.amqp_url)
    name = f"restarted-{os.getpid()}"
    channel = pika.BlockingConnection(url).channel()
    channel.confirm_delivery()
    declare_with_dead_letters(channel, name, **{"x-delivery-limit": 0})
    channel.basic_publish("", name, b"held")
    channel.basic_publish("", name, b"waiting")
    assert eventually(lambda: channel.basic_get(name)[0], "a task")
    own_broker.stop()
    own_broker.start()

    def take(queue: str) -> bytes | None:
        body: bytes | None = pika.BlockingConnection(url).channel().basic_get(queue)[2]
        return body

    assert eventually(lambda: take(f"{name}.dead"), "the task that was held") == b"held"
    assert eventually(lambda: take(name), "the other task") == b"waiting"
    channel = pika.BlockingConnection(url).channel()
    for each in (name, f"{name}.dead"):
        channel.queue_delete(each)


def test_a_task_with_old_headers_fares_as_the_lesson_says(
    broker: Broker, scripts: Scripts, channel: BlockingChannel
) -> None:
    """That is why parked.py removes what RabbitMQ has written before it sends a task back."""
    doing = worker(scripts)
    death = {"queue": "tasks", "reason": "delivery_limit", "count": 1, "exchange": ""}
    old = {"x-death": [death | {"routing-keys": ["tasks"]}]}
    channel.confirm_delivery()
    channel.basic_publish("", "tasks.retry", b"old", BasicProperties(headers=old))
    channel.basic_publish("", "tasks.retry", b"new")
    doing.expect_error(failed("new", 1))
    fate = "moves to `tasks`" if received("old") in doing.out.seen else "is dropped"
    row = "a task with old `x-death` headers expires in `tasks.retry`"
    assert table(broker.version)[row] == fate


def test_delayed_retries_exist_where_the_lesson_says(
    broker: Broker, channel: BlockingChannel
) -> None:
    """RabbitMQ 4.3 keeps a returned task back for a while, if it is told to; older ones do not."""
    arguments = {"x-delayed-retry-type": "all", "x-delayed-retry-min": 1000}
    channel.confirm_delivery()
    channel.queue_declare("delayed", durable=True, arguments={"x-queue-type": "quorum"} | arguments)
    channel.basic_publish("", "delayed", b"task")
    method = eventually(lambda: channel.basic_get("delayed")[0], "the task")
    channel.basic_nack(method.delivery_tag, requeue=True)
    begin = time.monotonic()
    eventually(lambda: channel.basic_get("delayed")[0], "the task is back")
    delayed = time.monotonic() - begin >= 0.9
    row = "delayed retries by RabbitMQ itself (`x-delayed-retry-type`)"
    assert table(broker.version)[row] == ("yes" if delayed else "no, the setting has no effect")


# --- Endurance ---

FAILING_WORK = """
    import random
    time.sleep(0.01)
    if text.startswith("always") or text.startswith("sometimes") and random.random() < 0.5:
        raise RuntimeError("as it was told to")
""".strip()


@pytest.mark.timeout(400)  # three brokers that are slow to start
def test_failing_tasks_under_fire(
    own_broker: Broker,
    scripts: Scripts,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Each of 300 tasks is done or parked, however often workers and the broker are killed.

    A fifth of them fails at random, and a tenth always. None is parked before it has failed three
    times, unless RabbitMQ has parked it because three workers died with it.
    """
    rng = random.Random(3)
    kinds = ["always", "sometimes", "sometimes", *["good"] * 7]
    tasks = [f"{kinds[n % 10]}-{n}" for n in range(300)]
    kill_at = set(rng.sample(range(600), 20))  # lines: each task is received, and done or failed
    outage_at = set(rng.sample(range(600), 3))

    workers = Crew(scripts, 4, str(worker_that(FAILING_WORK, tmp_path)))
    for member in workers.members:
        member.expect(WAITING, timeout=30)
    own_broker.sync()
    in_hand: dict[int, str] = {}
    tries: Counter[str] = Counter()
    done: Counter[str] = Counter()
    waiting = iter(tasks)
    channel: BlockingChannel | None = None

    def send(task: str | None) -> None:
        nonlocal channel
        while task:
            try:
                if channel is None:
                    url = pika.URLParameters(scripts.amqp_url)
                    channel = pika.BlockingConnection(url).channel()
                put(channel, task)
                task = None
            except AMQPError:  # RabbitMQ was killed meanwhile
                channel = None

    def is_parked() -> set[str]:
        lines = scripts.run("dead_letters/parked.py").out.all()
        return {line[6:-1] for line in lines if line.startswith(" [x] ")}

    for _ in range(20):  # so many tasks are ahead of the workers
        send(next(waiting))
    lines = outages = 0
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        try:
            number, line = workers.lines.get(timeout=1)
        except queue.Empty:
            if is_parked() | set(done) == set(tasks):
                break
            continue
        if found := RECEIVED.fullmatch(line):
            in_hand[number] = found[1]
            tries[found[1]] += 1
        elif line == DONE:
            done[in_hand.pop(number)] += 1
            send(next(waiting, None))
        elif line.startswith(" [!] '"):
            send(next(waiting, None))
        else:
            continue
        if lines in kill_at:
            workers.kill_one(rng)
        if lines in outage_at:
            own_broker.kill()
            workers.kill_one(rng)
            own_broker.start()
            outages += 1
        lines += 1
    for member in workers.members:
        assert member.process.poll() is None
        member.stop()
    while not workers.lines.empty():  # what came while we looked at the parked ones
        if found := RECEIVED.fullmatch(workers.lines.get()[1]):
            tries[found[1]] += 1
    final = pika.BlockingConnection(pika.URLParameters(scripts.amqp_url)).channel()
    left = parked(final)
    names = {body.decode() for body, _ in left}
    by_broker = [body.decode() for body, properties in left if len(failures_of(properties)) < 3]
    record_property(
        "failing tasks under fire",
        f"{len(tasks)} tasks, {len(done)} done, {len(names)} parked "
        f"({len(by_broker)} by RabbitMQ), "
        f"{sum(times > 1 for times in done.values())} done twice, {len(left) - len(names)} parked "
        f"twice, {len(names & set(done))} both, {len(set(tasks) - set(done) - names)} lost; "
        f"{tries.total()} tries; {workers.killed} workers and {outages} brokers killed",
    )
    assert set(done) | names == set(tasks)
    assert names >= {task for task in tasks if task.startswith("always")}
    for body, properties in left:
        deaths = (properties.headers or {}).get("x-death", [])
        limit = any(death["reason"] == "delivery_limit" for death in deaths)
        assert limit or tries[body.decode()] >= len(failures_of(properties)) == 3
    assert (workers.killed, outages) == (23, 3)
    assert [line for line in workers.complaints() if "as it was told to" not in line] == []
