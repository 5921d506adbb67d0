"""Work queues: each task to exactly one worker. Most of what the lesson shows is tested by playing
it: tasks dealt out in turn, lost, forgotten, fairly shared, and longer than the heartbeat."""

from __future__ import annotations

import subprocess
import threading
import time
from contextlib import ExitStack, closing

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ChannelClosedByBroker, ConnectionClosedByBroker
from pika.spec import Basic, Queue

from tests.proxy import ACK, PUBLISH, Proxy, Watch
from tests.scripts import (
    DONE,
    FILE_WORKER,
    LOST,
    NEW_FILE,
    NEW_TASK,
    PARKED,
    WORKER,
    Scripts,
    consumer,
    put,
    received,
    size,
    tasks_of,
)
from tools.broker import Broker, eventually, virtual_host_of


def counts(broker: Broker, amqp_url: str) -> list[str]:
    """Return messages_ready and messages_unacknowledged, as rabbitmqctl shows them."""
    columns = ("name", "messages_ready", "messages_unacknowledged")
    command = ("-q", "-p", virtual_host_of(amqp_url), "list_queues", *columns)
    rows = [line.split("\t") for line in broker.rabbitmqctl(*command).splitlines()]
    return next(row[1:] for row in rows if row[0] == "task_queue")


def test_each_dot_is_a_second_of_work(scripts: Scripts) -> None:
    """A task takes as many seconds as it has dots."""
    doing = consumer(scripts, WORKER)
    scripts.run(NEW_TASK, "one. two.")
    doing.expect(DONE)
    begin, end = (doing.out.time_of(line) for line in (received("one. two."), DONE))
    assert 1.9 < end - begin < 4, "seconds, also on a busy machine"


# --- Acknowledgements: a worker may crash ---


def kill(scripts: Scripts, channel: BlockingChannel, task: str, moment: int | None) -> float:
    """Kill a worker when a frame passes, or in its work. Another one does its task and one more.
    Return how many seconds after the kill it has the task."""
    killed: list[float] = []

    def watch(index: int, _to_broker: bool) -> bool:
        if index == moment:
            first.process.kill()
            killed.append(time.monotonic())
        return index != moment

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        first = consumer(scripts, WORKER, amqp_url=proxy.url)
        second = consumer(scripts, WORKER)
        put(channel, "task_queue", task, "another")
        if moment is None:
            first.expect(received(task))
            killed.append(time.monotonic())
            first.process.kill()
        second.expect(received(task, redelivered=True))
        second.expect(DONE, count=2)
    assert first.wait() == -9
    assert (DONE in first.out.seen) == (moment == ACK)
    put(channel, "task_queue", "next")
    second.expect(received("next"))  # with a prefetch of one, all before are acknowledged
    assert sorted(tasks_of(second)) == sorted([task, "another", "next"])
    second.stop()
    channel.queue_delete("task_queue")
    return second.out.time_of(received(task, redelivered=True)) - killed[0]


def test_a_worker_killed_at_any_moment_loses_nothing(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """Killed when the task comes, in its work, or before its acknowledgement: the task goes to
    another worker within a second, marked as redelivered."""
    moments = {"task": Basic.Deliver.INDEX, "task..": None, "task.": ACK}
    seconds = [kill(scripts, channel, task, moment) for task, moment in moments.items()]
    assert min(seconds) < 1, "each, on a machine that is not busy"
    assert max(seconds) < 10, "and never as late as heartbeats would tell"


def test_a_killed_worker_loses_nothing_that_was_sent_to_it(
    own_broker: Broker, scripts: Scripts, channel: BlockingChannel
) -> None:
    """All that it had is unacknowledged, and in the queue again when it is dead, also what it had
    not begun. What it had acknowledged does not come back."""
    first = consumer(scripts, WORKER, "--prefetch", "10")
    mine, url = ["long" + "." * 60, "behind", "behind, too"], scripts.amqp_url
    put(channel, "task_queue", *(f"short {n}" for n in range(5)), *mine)
    first.expect(received(mine[0]))
    eventually(lambda: counts(own_broker, url) == ["0", "3"], "five are acknowledged, at once")
    put(channel, "task_queue", "to another one")
    first.kill()
    eventually(lambda: size(channel, "task_queue") == 4, "all are back")
    assert counts(own_broker, url) == ["4", "0"]
    again = [channel.basic_get("task_queue", auto_ack=True) for _ in range(4)]
    assert [body.decode() for _, _, body in again if body][:3] == mine
    assert all(method and method.redelivered for method, _, _ in again[:3])


@pytest.mark.parametrize("options", [[], ["--auto-ack"]], ids=["acknowledged", "auto-ack"])
def test_what_was_dealt_out_before_the_connection_was_lost(
    scripts: Scripts, channel: BlockingChannel, options: list[str]
) -> None:
    """It is in its queue again, also what the worker had not begun. With --auto-ack it is lost."""
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
        losing = consumer(scripts, WORKER, "--prefetch", "0", *options, amqp_url=url)
        put(channel, "task_queue", *tasks)
        losing.expect(received("in hand...."))
        # The thread that sends these reads what was there before them.
        eventually(lambda: len(heartbeats) >= 3, "the worker has received all three")
    losing.expect_error(LOST)
    losing.stop()
    assert tasks_of(losing) == tasks[:1]
    eventually(lambda: size(channel, "task_queue") == (0 if options else 3), "the rest is back")


def test_a_lone_task_is_acknowledged_in_ten_milliseconds(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """With a prefetch of 100, too, where tasks that follow each other are acknowledged together.
    (It is the fastest of five that counts: the machine may be busy.)"""
    acknowledged: list[float] = []

    def watch(index: int, to_broker: bool) -> bool:
        acknowledged.extend([time.monotonic()] * (to_broker and index == ACK))
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        doing = consumer(scripts, WORKER, "--prefetch", "100", amqp_url=proxy.url)
        for n in range(1, 6):
            put(channel, "task_queue", "lone")
            eventually(lambda n=n: len(acknowledged) == n, "the task is acknowledged")  # type: ignore[misc]
        doing.expect(DONE, count=5)
    done = [at for at, line in zip(doing.out.times, doing.out.seen, strict=True) if line == DONE]
    assert min(a - b for a, b in zip(acknowledged, done, strict=True)) < 0.03


# --- Durability and confirms: RabbitMQ may crash ---


def test_a_killed_broker_keeps_what_is_durable_and_persistent(
    own_broker: Broker, scripts: Scripts, amqp_url: str
) -> None:
    """A persistent task in a durable queue is kept; a transient one is lost, and so is a queue
    that is not durable, with all in it."""
    scripts.run(NEW_TASK, "persistent")
    scripts.run(NEW_TASK, "--transient", "transient")
    channel = pika.BlockingConnection(pika.URLParameters(amqp_url)).channel()
    assert size(channel, "task_queue") == 2
    try:
        channel.queue_declare("not durable")
    except ConnectionClosedByBroker as error:
        # Since 4.3 RabbitMQ refuses a queue that is neither durable nor exclusive, unless it is
        # configured to permit it (guide "Deprecated Features"). The exclusive ones are left.
        if "transient_nonexcl_queues" not in error.reply_text:
            raise
        channel = pika.BlockingConnection(pika.URLParameters(amqp_url)).channel()
        channel.queue_declare("not durable", exclusive=True)
    put(channel, "not durable", "persistent")

    own_broker.sync()
    own_broker.kill()
    own_broker.start()

    channel = pika.BlockingConnection(pika.URLParameters(amqp_url)).channel()
    assert size(channel, "task_queue") == 1
    doing = consumer(scripts, WORKER)
    doing.expect(DONE)
    assert tasks_of(doing) == ["persistent"]
    with pytest.raises(ChannelClosedByBroker, match="NOT_FOUND"):
        channel.queue_declare("not durable", passive=True)


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
        producer = scripts.start(NEW_TASK, amqp_url=proxy.url)
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
        producer = scripts.run(NEW_TASK, amqp_url=proxy.url, status=1)
    assert producer.out.all() == []
    assert len(producer.err.all()) == 1


def test_a_producer_gives_up_after_ten_seconds(scripts: Scripts, channel: BlockingChannel) -> None:
    """When RabbitMQ does not confirm the task, or does not even declare its queue. So do the
    producers of lesson 8. (A queue that has no majority, for example, accepts no task.)"""
    consumer(scripts, FILE_WORKER).stop()  # which declares its queues
    put(channel, "tasks.parked", "task")

    def all_but(held: int) -> Watch:
        return lambda index, _to_broker: index != held

    unknown = " [!] No confirm within 10 s: nobody knows if the task is stored"
    both = " [!] No confirm within 10 s: the task is still parked, maybe also sent"
    with ExitStack() as stack:
        begin = time.monotonic()
        started = {}
        for held, told, *command in (
            (ACK, unknown, NEW_TASK),
            (Queue.DeclareOk.INDEX, unknown, NEW_TASK),
            (ACK, unknown, NEW_FILE, "LICENSE"),
            (ACK, both, PARKED, "--send-back"),
        ):
            proxy = stack.enter_context(closing(Proxy(scripts.amqp_url, all_but(held))))
            started[scripts.start(*command, amqp_url=proxy.url)] = told
        for producer, told in started.items():
            assert producer.wait() == 1
            assert producer.out.seen == ([" [x] 'task'"] if told == both else [])
            assert producer.err.seen == [told]
            assert producer.err.times[0] - begin >= 10
    eventually(lambda: size(channel, "tasks.parked") == 1, "the parked task is back")


def test_a_task_that_reaches_no_queue_is_an_error(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """A queue that is deleted before the task arrives: the task is returned, and that is said."""

    def watch(index: int, _to_broker: bool) -> bool:
        if index == PUBLISH:
            channel.queue_delete("task_queue")
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        producer = scripts.run(NEW_TASK, amqp_url=proxy.url, status=1)
    assert producer.out.all() == []
    assert producer.err.all() == [" [!] 1 unroutable message(s) returned"]


def test_a_task_that_the_broker_rejects_is_an_error(broker: Broker, scripts: Scripts) -> None:
    """A full queue that rejects: the broker answers with a nack, and that is said."""
    full = {"max-length": 1, "overflow": "reject-publish"}
    policy = {"pattern": ".*", "definition": full, "apply-to": "queues"}
    broker.api("PUT", f"policies/{virtual_host_of(scripts.amqp_url)}/full", policy)
    scripts.run(NEW_TASK, "fits")
    producer = scripts.run(NEW_TASK, "does not", status=1)
    assert producer.out.all() == []
    assert producer.err.all() == [" [!] 0 message(s) NACKed"]
