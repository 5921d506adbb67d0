"""Work queues: each task to exactly one worker."""

from __future__ import annotations

import re
import struct
import subprocess
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ChannelClosedByBroker, ConnectionClosedByBroker
from pika.spec import Basic, Queue

from tests.proxy import ACK, PUBLISH, Proxy, Watch
from tests.scripts import DONE, Script, Scripts, another_user
from tools import ROOT
from tools.broker import Broker, eventually, virtual_host_of

WAITING = " [*] Waiting for tasks. To exit press CTRL+C"


def received(task: str, redelivered: bool = False) -> str:
    """Return the line in which a worker says that it has received a task."""
    return f" [x] Received '{task}'" + (" (redelivered)" if redelivered else "")


def worker(
    scripts: Scripts,
    *options: str,
    amqp_url: str | None = None,
    script: str | Path = "work_queues/worker.py",
) -> Script:
    """Start a worker and wait until it waits for tasks."""
    started = scripts.start(script, *options, amqp_url=amqp_url)
    started.expect(WAITING)
    return started


WORK = """\
    for _dot in range(text.count(".")):
        time.sleep(1)
"""


def worker_that(work: str, folder: Path) -> Path:
    """Write a copy of the worker with another line of work, and return its path."""
    text = (ROOT / "work_queues/worker.py").read_text(encoding="utf-8")
    assert text.count(WORK) == 1
    path = folder / "worker.py"
    path.write_text(text.replace(WORK, f"    {work}\n"), encoding="utf-8")
    return path


def put(channel: BlockingChannel, *tasks: str) -> None:
    """Put tasks into the queue in this order, as new_task.py does, and faster."""
    channel.queue_declare("task_queue", durable=True)
    for task in tasks:
        channel.basic_publish(
            "", "task_queue", task.encode(), pika.BasicProperties(delivery_mode=2)
        )


def tasks_of(script: Script) -> list[str]:
    """Return the tasks that a worker has received, in order."""
    found = [re.match(r" \[x\] Received '(.*)'", line) for line in script.out.seen]
    return [match[1] for match in found if match]


def ready(channel: BlockingChannel) -> int:
    """Return how many tasks are ready in the queue, as the broker counts them."""
    return int(channel.queue_declare("task_queue", passive=True).method.message_count)


def consumers(channel: BlockingChannel) -> int:
    """Return how many workers the queue has, as the broker counts them."""
    return int(channel.queue_declare("task_queue", passive=True).method.consumer_count)


def counts(broker: Broker, amqp_url: str) -> tuple[int, int]:
    """Return messages_ready and messages_unacknowledged, as rabbitmqctl shows them."""
    columns = ("name", "messages_ready", "messages_unacknowledged")
    virtual_host = virtual_host_of(amqp_url)
    shown = broker.rabbitmqctl("-q", "-p", virtual_host, "list_queues", *columns)
    row = next(line.split("\t") for line in shown.splitlines() if line.startswith("task_queue\t"))
    return int(row[1]), int(row[2])


@pytest.mark.parametrize("task", ["no dot", "one.", "first. second."])
def test_each_dot_is_a_second_of_work(
    scripts: Scripts, channel: BlockingChannel, task: str
) -> None:
    """A task takes as many seconds as it has dots."""
    doing = worker(scripts)
    begin = time.monotonic()
    put(channel, task)
    doing.expect(DONE)
    assert doing.out.seen == [WAITING, received(task), DONE]
    assert doing.out.time_of(DONE) - begin >= task.count(".")
    assert doing.out.time_of(DONE) - doing.out.time_of(received(task)) < task.count(".") + 0.9


def test_without_a_limit_tasks_are_dealt_out_in_turn(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """Three workers without a prefetch limit get equal numbers, one after the other."""
    workers = [worker(scripts, "--prefetch", "0") for _ in range(3)]
    put(channel, *(f"task {i}" for i in range(9)))
    for each in workers:
        each.expect(DONE, count=3)
    assert sorted(tasks_of(each) for each in workers) == [
        ["task 0", "task 3", "task 6"],
        ["task 1", "task 4", "task 7"],
        ["task 2", "task 5", "task 8"],
    ]


def test_automatic_acknowledgement_loses_what_a_killed_worker_had(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """With --auto-ack the task in the hands of a killed worker is lost, and those dealt to it."""
    first, second = (worker(scripts, "--auto-ack") for _ in range(2))
    put(channel, *(f"task {i}" + "......" * (i % 2 == 0) for i in range(6)))
    first.expect(received("task 0......"))
    assert ready(channel) == 0  # all six were sent, and forgotten
    first.kill()

    second.expect(DONE, count=3)
    eventually(lambda: consumers(channel) == 1, "the broker knows that the killed one is gone")
    put(channel, "after the kill")
    second.expect(DONE, count=4)
    assert tasks_of(first) == ["task 0......"]
    assert tasks_of(second) == ["task 1", "task 3", "task 5", "after the kill"]
    assert ready(channel) == 0  # so tasks 0, 2 and 4 are nowhere


MOMENTS = {
    "at the delivery": Basic.Deliver.INDEX,
    "between its work and its acknowledgement": ACK,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_killed_at_any_moment_loses_nothing(
    scripts: Scripts, channel: BlockingChannel, moment: str
) -> None:
    """A task not acknowledged goes to another worker within a second, marked as redelivered."""
    killed: list[float] = []

    def watch(index: int, _to_broker: bool) -> bool:
        if index != MOMENTS[moment]:
            return True
        first.process.kill()
        killed.append(time.monotonic())
        return False

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        first = worker(scripts, amqp_url=proxy.url)
        second = worker(scripts)
        put(channel, "the task", "another")
        second.expect(received("the task", redelivered=True))
        second.expect(DONE, count=2)
    assert first.wait() == -9
    assert first.out.seen == [WAITING] + [received("the task"), DONE] * (
        moment != "at the delivery"
    )
    assert sorted(tasks_of(second)) == ["another", "the task"]
    assert second.out.time_of(received("the task", redelivered=True)) - killed[0] < 1
    put(channel, "the next")
    second.expect(received("the next"))  # with a prefetch of one, all before are acknowledged


def test_a_worker_killed_in_its_work_loses_nothing(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """All that was dealt to a killed worker goes to another, also what it had not begun."""
    first = worker(scripts, "--prefetch", "0")
    put(channel, "in hand....", "dealt out", "dealt out, too")
    first.expect(received("in hand...."))
    second = worker(scripts)
    assert ready(channel) == 0
    killed = time.monotonic()
    first.kill()
    second.expect(received("in hand....", redelivered=True))
    assert second.out.times[-1] - killed < 1
    second.kill()  # in the middle of it, once more
    third = worker(scripts)
    third.expect(DONE, count=3)
    redelivered = {
        received(t, redelivered=True) for t in ("in hand....", "dealt out", "dealt out, too")
    }
    assert redelivered < set(third.out.seen)


def test_an_acknowledged_task_is_not_done_again(scripts: Scripts, channel: BlockingChannel) -> None:
    """What a killed worker has acknowledged stays done: only the task in its hands comes back."""
    first = worker(scripts)
    put(channel, "done", "in hand.")
    first.expect(received("in hand."))  # with a prefetch of one, "done" is acknowledged by now
    first.kill()
    second = worker(scripts)
    second.expect(DONE)
    assert second.out.seen == [WAITING, received("in hand.", redelivered=True), DONE]


@pytest.mark.parametrize("options", [[], ["--auto-ack"]], ids=["acknowledged", "auto-ack"])
def test_what_was_dealt_out_before_the_connection_was_lost(
    scripts: Scripts, channel: BlockingChannel, options: list[str]
) -> None:
    """What is in its queue again is left to others; what RabbitMQ has forgotten is still done."""
    tasks = ["in hand....", "dealt out", "dealt out, too"]
    delivered: list[int] = []
    heartbeats: list[int] = []  # of the worker, since it was sent all three

    def watch(index: int, to_broker: bool) -> bool:
        if to_broker and index == 0 and len(delivered) == 3:
            heartbeats.append(index)
        delivered.extend([index] * (index == Basic.Deliver.INDEX))
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        url = f"{proxy.url}?heartbeat=1"
        losing = worker(scripts, "--prefetch", "0", *options, amqp_url=url)
        put(channel, *tasks)
        losing.expect(received("in hand...."))
        # The thread that sends these reads what was there before them.
        eventually(lambda: len(heartbeats) >= 3, "the worker has received all three")
    losing.expect_error(re.compile(r" \[!\] .+; trying again every second"))
    if options:
        losing.expect(DONE, count=3)
    losing.stop()
    assert tasks_of(losing) == tasks[: 3 if options else 1]
    eventually(lambda: consumers(channel) == 0, "the broker knows that the worker is gone")
    assert ready(channel) == (0 if options else 3)


def test_a_task_may_take_longer_than_the_heartbeat(
    broker: Broker, scripts: Scripts, channel: BlockingChannel
) -> None:
    """A task of six heartbeats runs once, is acknowledged once, on one connection."""
    virtual_host = virtual_host_of(scripts.amqp_url)

    def connections() -> set[str]:
        found = broker.api("GET", f"vhosts/{virtual_host}/connections")
        return {each["name"] for each in found if each.get("timeout") == 1}

    doing = worker(scripts, amqp_url=f"{scripts.amqp_url}?heartbeat=1")
    put(channel, "a long task......")
    doing.expect(received("a long task......"))
    before = eventually(connections, "the broker shows the worker's connection")
    doing.expect(DONE)

    def stats() -> dict[str, int]:
        queue = broker.api("GET", f"queues/{virtual_host}/task_queue")
        return dict(queue.get("message_stats", {}))

    eventually(lambda: stats().get("ack") == 1, "the broker counts one acknowledgement")
    assert stats()["deliver"] == 1
    assert stats().get("redeliver", 0) == 0
    assert connections() == before
    assert len(before) == 1
    assert doing.err.seen == []


def test_a_forgotten_acknowledgement_shows(
    own_broker: Broker, scripts: Scripts, channel: BlockingChannel
) -> None:
    """messages_unacknowledged grows with --forget-ack; the tasks come back when it quits."""
    forgetful = worker(scripts, "--prefetch", "0", "--forget-ack")
    for i in range(1, 4):
        put(channel, f"task {i}")
        forgetful.expect(DONE, count=i)
        assert counts(own_broker, scripts.amqp_url) == (0, i)
    forgetful.stop()
    eventually(lambda: counts(own_broker, scripts.amqp_url) == (3, 0), "they are ready again")
    other = worker(scripts)
    other.expect(DONE, count=3)
    assert other.out.seen[1::2] == [received(f"task {i}", redelivered=True) for i in range(1, 4)]


def test_rabbitmqctl_shows_ready_and_unacknowledged_tasks(
    own_broker: Broker, scripts: Scripts, channel: BlockingChannel
) -> None:
    """While a task runs it is unacknowledged, and those behind it are ready."""
    long = "a" + "." * 60
    put(channel, long, "b", "c")
    doing = worker(scripts)
    doing.expect(received(long))
    assert counts(own_broker, scripts.amqp_url) == (2, 1)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_broker_restart_keeps_what_is_durable_and_persistent(
    own_broker: Broker, scripts: Scripts, amqp_url: str, end: str
) -> None:
    """A persistent task in a durable queue is kept; a transient one is lost, and so is a queue
    that is not durable, with all in it."""
    scripts.run("work_queues/new_task.py", "persistent")
    scripts.run("work_queues/new_task.py", "--transient", "transient")
    channel = pika.BlockingConnection(pika.URLParameters(amqp_url)).channel()
    assert ready(channel) == 2
    try:
        channel.queue_declare("not durable")
    except ConnectionClosedByBroker as error:
        # Since 4.3 RabbitMQ refuses a queue that is neither durable nor exclusive, unless it is
        # configured to permit it (guide "Deprecated Features"). The exclusive ones are left.
        if "transient_nonexcl_queues" not in error.reply_text:
            raise
        channel = pika.BlockingConnection(pika.URLParameters(amqp_url)).channel()
        channel.queue_declare("not durable", exclusive=True)
    channel.confirm_delivery()
    channel.basic_publish("", "not durable", b"", pika.BasicProperties(delivery_mode=2), True)

    own_broker.sync()
    getattr(own_broker, end)()
    own_broker.start()

    channel = pika.BlockingConnection(pika.URLParameters(amqp_url)).channel()
    assert ready(channel) == 1
    doing = worker(scripts)
    doing.expect(DONE)
    assert tasks_of(doing) == ["persistent"]
    with pytest.raises(ChannelClosedByBroker, match="NOT_FOUND"):
        channel.queue_declare("not durable", passive=True)


@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
def test_a_queue_keeps_its_settings(
    scripts: Scripts, channel: BlockingChannel, script: str
) -> None:
    """A queue that exists is refused with other settings, and the script says so in one line."""
    channel.queue_declare("task_queue", durable=True, arguments={"x-max-length": 5})
    refused = scripts.run(f"work_queues/{script}", status=1)
    assert refused.out.all() == []
    (line,) = refused.err.all()
    assert line.startswith(" [!] (406, \"PRECONDITION_FAILED - inequivalent arg 'x-max-length'")
    assert channel.queue_declare("task_queue", passive=True).method.message_count == 0


HEAVY_AND_LIGHT = [f"heavy {i}." if i % 2 else f"light {i}" for i in range(1, 7)]


def share(
    scripts: Scripts, channel: BlockingChannel, prefetch: str
) -> tuple[list[list[str]], float]:
    """Let two workers do heavy and light tasks in turn; return what each got, and the seconds."""
    put(channel)
    workers = [worker(scripts, "--prefetch", prefetch) for _ in range(2)]
    put(channel, *HEAVY_AND_LIGHT)
    eventually(
        lambda: sum(each.out.seen.count(DONE) for each in workers) == len(HEAVY_AND_LIGHT),
        "all tasks are done",
    )
    tasks = [tasks_of(each) for each in workers]
    seconds = max(w.out.times[-1] for w in workers) - min(w.out.times[1] for w in workers)
    for each in workers:
        each.stop()  # before its last acknowledgement is out, perhaps: that task comes again
    channel.queue_delete("task_queue")
    return tasks, seconds


def test_without_a_limit_one_worker_gets_all_heavy_tasks(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """Tasks are dealt out without a look at their weight: every second one is a heavy one."""
    tasks, _seconds = share(scripts, channel, prefetch="0")
    assert tasks == [HEAVY_AND_LIGHT[::2], HEAVY_AND_LIGHT[1::2]]


def test_a_prefetch_of_one_is_fair(scripts: Scripts, channel: BlockingChannel) -> None:
    """The next task goes to the worker that is free, and the same work is done sooner."""
    unfair, slow = share(scripts, channel, prefetch="0")
    fair, quick = share(scripts, channel, prefetch="1")
    assert [sum("heavy" in task for task in tasks) for tasks in unfair] == [3, 0]
    assert sorted(sum("heavy" in task for task in tasks) for tasks in fair) == [1, 2]
    assert quick < slow - 0.5, "two seconds are less than three"


def test_a_task_is_sent_once_the_broker_confirms_it(scripts: Scripts) -> None:
    """new_task.py says "Sent" when the broker's confirm is here, and not before."""
    confirmed = threading.Event()
    allowed = threading.Event()

    def watch(index: int, _to_broker: bool) -> bool:
        if index == ACK:
            confirmed.set()
            allowed.wait(10)
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        producer = scripts.start("work_queues/new_task.py", amqp_url=proxy.url)
        assert confirmed.wait(10), "the broker confirms the task"
        with pytest.raises(subprocess.TimeoutExpired):
            producer.process.wait(0.5)
        assert producer.out.seen == []
        allowed.set()
        assert producer.wait() == 0
    assert producer.out.seen == [" [x] Sent 'Hello...'"]


def test_a_task_without_a_confirm_is_no_task_sent(scripts: Scripts) -> None:
    """A connection that is lost before the confirm came makes an error."""

    def watch(index: int, _to_broker: bool) -> bool:
        if index == ACK:
            proxy.close()
        return index != ACK

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        producer = scripts.run("work_queues/new_task.py", amqp_url=proxy.url, status=1)
    assert producer.out.all() == []
    assert len(producer.err.all()) == 1


def test_new_task_gives_up_after_ten_seconds(scripts: Scripts) -> None:
    """When RabbitMQ does not confirm the task, or does not even declare its queue."""

    def all_but(held: int) -> Watch:
        return lambda index, _to_broker: index != held

    with ExitStack() as stack:
        held = [ACK, Queue.DeclareOk.INDEX]
        proxies = [
            stack.enter_context(closing(Proxy(scripts.amqp_url, all_but(index)))) for index in held
        ]
        begin = time.monotonic()
        for producer in [scripts.start("work_queues/new_task.py", amqp_url=p.url) for p in proxies]:
            assert producer.wait() == 1
            assert producer.out.seen == []
            told = " [!] No confirm within 10 s: nobody knows if the task is stored"
            assert producer.err.seen == [told]
            assert producer.err.times[0] - begin >= 10


def test_a_task_that_reaches_no_queue_is_an_error(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """A queue that is deleted before the task arrives: the task is returned, and that is said."""

    def watch(index: int, _to_broker: bool) -> bool:
        if index == PUBLISH:
            channel.queue_delete("task_queue")
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        producer = scripts.run("work_queues/new_task.py", amqp_url=proxy.url, status=1)
    assert producer.out.all() == []
    assert producer.err.all() == [" [!] 1 unroutable message(s) returned"]


def test_a_task_that_the_broker_rejects_is_an_error(broker: Broker, scripts: Scripts) -> None:
    """A full queue that rejects: the broker answers with a nack, and that is said."""
    virtual_host = virtual_host_of(scripts.amqp_url)
    full = {"max-length": 1, "overflow": "reject-publish"}
    policy = {"pattern": ".*", "definition": full, "apply-to": "queues"}
    broker.api("PUT", f"policies/{virtual_host}/full", policy)
    scripts.run("work_queues/new_task.py", "fits")
    producer = scripts.run("work_queues/new_task.py", "does not", status=1)
    assert producer.out.all() == []
    assert producer.err.all() == [" [!] 0 message(s) NACKed"]


def test_a_task_that_is_no_text_is_done_like_any_other(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """Bytes that are no UTF-8 bring no worker down; their dots are seconds as well."""
    doing = worker(scripts)
    scripts.run("work_queues/new_task.py", b"\xff\xfe.")
    doing.expect(DONE)
    assert doing.out.seen == [WAITING, received(r"\udcff\udcfe."), DONE]
    put(channel, "next")
    doing.expect(received("next"))


@pytest.mark.parametrize("failure", ["ValueError", "SystemExit"])
def test_a_task_that_fails_neither_ends_its_worker_nor_is_lost(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path, failure: str
) -> None:
    """Work that raises is one line on standard error. The tasks behind it are done, and the task
    is tried again, about once a second, with the properties that it had."""
    copy = worker_that(f"if text == 'two':\n        raise {failure}", tmp_path)
    failing = worker(scripts, script=copy)
    properties = pika.BasicProperties(delivery_mode=2, message_id="its id", headers={"a": 1})
    channel.basic_publish("", "task_queue", b"two", properties)
    put(channel, "3", "4")
    told = f" [!] 'two' failed: {failure}()"
    failing.expect_error(told, count=3)
    assert tasks_of(failing)[:4] == ["two", "3", "4", "two"]
    assert failing.out.seen.count(DONE) == 2
    tries = [at for at, s in zip(failing.err.times, failing.err.seen, strict=True) if told in s]
    assert tries[2] - tries[0] >= 2, "seconds: no tight loop"
    failing.stop()
    eventually(lambda: ready(channel) == 1, "the task is in its queue, once")
    method, kept, body = channel.basic_get("task_queue", auto_ack=True)
    assert method and kept and body == b"two"  # noqa: PT018
    assert (kept.delivery_mode, kept.message_id, kept.headers) == (2, "its id", {"a": 1})


def test_a_failed_task_may_name_its_sender(
    broker: Broker, scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """RabbitMQ checks that a message names the user who sends it. The worker is not that user, and
    sends a failed task to the end of the queue all the same."""
    failing = worker(scripts, script=worker_that("int(text)", tmp_path))
    with (
        another_user(broker, scripts.amqp_url, "sender", write=".*") as url,
        closing(pika.BlockingConnection(pika.URLParameters(url))) as connection,
    ):
        properties = pika.BasicProperties(user_id="sender")
        connection.channel().basic_publish("", "task_queue", b"two", properties)
    failing.expect(received("two"), count=2)
    failing.stop()
    assert all("'two' failed" in line for line in failing.err.seen)
    eventually(lambda: ready(channel) == 1, "the task is in its queue, once")


def test_a_failed_task_is_sent_to_its_queue_alone(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """A CC header names more queues, which got a copy when the task was sent. They get no second
    one, and the task does not expire at its second try."""
    channel.queue_declare("audit", durable=True)
    failing = worker(scripts, script=worker_that("int(text)", tmp_path))
    order = pika.BasicProperties(headers={"CC": ["audit"], "a": 1}, expiration="60000")
    channel.basic_publish("", "task_queue", b"two", order)
    failing.expect(received("two"), count=3)
    failing.stop()
    assert channel.queue_declare("audit", passive=True).method.message_count == 1
    eventually(lambda: ready(channel) == 1, "the task is in its queue, once")
    _method, kept, _body = channel.basic_get("task_queue", auto_ack=True)
    assert kept
    assert (kept.headers, kept.expiration) == ({"a": 1}, None)


class LargeNumber(pika.BasicProperties):
    """Properties with a header that other clients can send: pika reads it, but cannot write it."""

    def encode(self) -> list[bytes]:
        """Return the bytes: pika writes an integer, and this makes it a float, 1e300."""
        pieces: list[bytes] = super().encode()  # type: ignore[no-untyped-call]
        integer, number = struct.pack(">q", 2**62), struct.pack(">d", 1e300)
        return [b"".join(pieces).replace(b"\x04sizel" + integer, b"\x04sized" + number)]


@pytest.mark.parametrize("why", ["full queue", "no permission", "strange header"])
def test_a_failed_task_that_is_not_taken_back_holds_up_no_other(
    broker: Broker, scripts: Scripts, channel: BlockingChannel, tmp_path: Path, why: str
) -> None:
    """The worker says so, keeps the task unacknowledged, and does the others. When the worker ends,
    the task is in its queue."""
    strange = LargeNumber(headers={"size": 2**62})  # type: ignore[no-untyped-call]
    channel.queue_declare("task_queue", durable=True)
    plain = pika.BasicProperties(delivery_mode=2)
    channel.basic_publish("", "task_queue", b"two", strange if "header" in why else plain)
    put(channel, "3", "4")
    if "full" in why:
        limit = {"max-length": 3, "overflow": "reject-publish"}
        policy = {"pattern": "task_queue", "definition": limit}
        broker.api("PUT", f"policies/{virtual_host_of(scripts.amqp_url)}/full", policy)
    copy = worker_that("time.sleep(2 * (text == 'two'))\n    int(text)", tmp_path)
    with another_user(broker, scripts.amqp_url, "reader", configure=".*", read=".*") as reader:
        failing = worker(scripts, script=copy, amqp_url=reader if "permission" in why else None)
        failing.expect(received("two"))
        put(channel, "5")  # now the queue has three, and is full
        failing.expect(DONE, count=3)
        put(channel, "6")
        failing.expect(DONE, count=4)
        failing.stop()
    assert tasks_of(failing) == ["two", "3", "4", "5", "6"]
    failed, kept = failing.err.seen
    assert failed.startswith(" [!] 'two' failed: ValueError(")
    assert kept.startswith(" [!] RabbitMQ does not take it back, so we keep it: ")
    eventually(lambda: ready(channel) == 1, "the task that it kept is in its queue, alone")


def test_a_prefetch_of_more_than_one_acknowledges_what_is_done_and_nothing_else(
    own_broker: Broker, scripts: Scripts, channel: BlockingChannel
) -> None:
    """Tasks that are done are acknowledged at once, though a long one follows them: a worker that
    is killed during that one leaves it and those behind it, and none before it."""
    first = worker(scripts, "--prefetch", "10")
    put(channel, *(f"short {n}" for n in range(5)), "long........", "behind")
    first.expect(received("long........"))
    eventually(lambda: counts(own_broker, scripts.amqp_url) == (0, 2), "five are acknowledged")
    first.kill()
    second = worker(scripts)
    second.expect(received("long........", redelivered=True))
    assert tasks_of(second) == ["long........"]


def test_work_in_the_callback_is_lost_on_a_task_longer_than_the_heartbeat(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """With --in-callback pika sends no heartbeats: the connection is closed, and the task, though
    it is done, comes again."""
    doing = worker(scripts, "--in-callback", amqp_url=f"{scripts.amqp_url}?heartbeat=1")
    put(channel, "a long task......")
    doing.expect(DONE)
    doing.expect_error(re.compile(r" \[!\] .+; trying again every second"))
    doing.expect(received("a long task......", redelivered=True))
