"""Work queues: each task to exactly one worker. Most of what the lesson shows is tested by playing
it: tasks dealt out in turn, lost, forgotten, fairly shared, and longer than the heartbeat."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ChannelClosedByBroker
from pika.spec import Basic, Queue

from tests.proxy import ACK, PUBLISH, Proxy, without
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
    limit_queue,
    put,
    received,
    size,
    tasks_of,
)
from tools.broker import Broker, eventually, virtual_host_of


def test_each_dot_is_a_second_of_work(scripts: Scripts) -> None:
    """A task takes as many seconds as it has dots."""
    doing = consumer(scripts, WORKER)
    scripts.run(NEW_TASK, "one. two.")
    doing.expect(DONE)
    begin, end = (doing.out.time_of(line) for line in (received("one. two."), DONE))
    assert 1.9 < end - begin < 4, "seconds, also on a busy machine"


# --- Acknowledgements: a worker may crash ---


@pytest.mark.parametrize(
    ("task", "moment"),
    [("task", Basic.Deliver.INDEX), ("task..", None), ("task.", ACK)],
    ids=["when the task comes", "in its work", "before it acknowledges"],
)
def test_a_worker_killed_at_any_moment_loses_nothing(
    scripts: Scripts, channel: BlockingChannel, task: str, moment: int | None
) -> None:
    """Its task goes to another worker at once, marked as redelivered."""
    killed: list[float] = []

    def kill() -> None:
        first.process.kill()
        killed.append(time.monotonic())

    def watch(index: int, _to_broker: bool) -> bool:
        if index == moment:
            kill()
        return index != moment

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        first = consumer(scripts, WORKER, amqp_url=proxy.url)
        second = consumer(scripts, WORKER)
        put(channel, "task_queue", task, "another")
        if moment is None:
            first.expect(received(task))
            kill()
        second.expect(received(task, redelivered=True))
        second.expect(DONE, count=2)
    assert first.wait() == -9
    assert (DONE in first.out.seen) == (moment == ACK)
    put(channel, "task_queue", "next")
    second.expect(received("next"))  # with a prefetch of one, all before are acknowledged
    assert sorted(tasks_of(second)) == sorted([task, "another", "next"])
    took = second.out.time_of(received(task, redelivered=True)) - killed[0]
    assert took < 3, "a second on a machine that is not busy, and far less than two heartbeats"


def test_a_killed_worker_loses_nothing_that_was_sent_to_it(
    own_broker: Broker, scripts: Scripts, channel: BlockingChannel
) -> None:
    """All that it had is unacknowledged, and in the queue again when it is dead, also what it had
    not begun. What it had acknowledged does not come back."""
    first = consumer(scripts, WORKER, "--prefetch", "10")
    mine = ["long" + "." * 60, "behind", "behind, too"]

    def counts() -> str:
        columns = "name", "messages_ready", "messages_unacknowledged"
        place = "-q", "-p", virtual_host_of(scripts.amqp_url)
        return own_broker.rabbitmqctl(*place, "list_queues", *columns).splitlines()[-1]

    put(channel, "task_queue", *(f"short {n}" for n in range(5)), *mine)
    first.expect(received(mine[0]))
    eventually(lambda: counts() == "task_queue\t0\t3", "five are acknowledged, at once")
    put(channel, "task_queue", "to another one")
    first.kill()
    eventually(lambda: size(channel, "task_queue") == 4, "all are back")
    assert counts() == "task_queue\t4\t0"
    again = [channel.basic_get("task_queue", auto_ack=True) for _ in range(4)]
    assert [body.decode() for _, _, body in again if body][:3] == mine
    assert all(method and method.redelivered for method, _, _ in again[:3])


@pytest.mark.parametrize("options", [[], ["--auto-ack"]], ids=["acknowledged", "auto-ack"])
def test_what_was_dealt_out_before_the_connection_was_lost(
    scripts: Scripts, channel: BlockingChannel, options: list[str]
) -> None:
    """It is in its queue again, also what the worker had not begun. With --auto-ack it is lost."""
    tasks = ["in hand....", "dealt out", "dealt out, too"]
    with closing(Proxy(scripts.amqp_url)) as proxy:
        url = f"{proxy.url}?heartbeat=1"
        losing = consumer(scripts, WORKER, "--prefetch", "0", *options, amqp_url=url)
        put(channel, "task_queue", *tasks)
        losing.expect(received("in hand...."))
        eventually(lambda: proxy.to_client[Basic.Deliver.INDEX] == 3, "all three are on the way")
        proxy.wait_for_heartbeats()  # the thread that sends them reads what was there before
    losing.expect_error(LOST)
    losing.stop()
    assert tasks_of(losing) == tasks[:1]
    eventually(lambda: size(channel, "task_queue") == (0 if options else 3), "the rest is back")


def test_a_lone_task_is_acknowledged_in_ten_milliseconds(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """With a prefetch of 100, too, where tasks that follow each other are acknowledged together.
    (It is the fastest of ten that counts: the machine may be busy.)"""
    acknowledged: list[float] = []

    def watch(index: int, to_broker: bool) -> bool:
        acknowledged.extend([time.monotonic()] * (to_broker and index == ACK))
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        doing = consumer(scripts, WORKER, "--prefetch", "100", amqp_url=proxy.url)
        for n in range(1, 11):
            put(channel, "task_queue", "lone")
            eventually(lambda n=n: len(acknowledged) == n, "the task is acknowledged")  # type: ignore[misc]
        doing.expect(DONE, count=10)
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
    # Newer ones refuse a queue that is neither durable nor exclusive (guide "Deprecated Features").
    channel.queue_declare("not durable", exclusive=not own_broker.version.startswith("3."))
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
    """When RabbitMQ does not confirm the task, or does not even declare its queue. It has not said
    "Sent". So do the producers of lesson 8. (A queue that has no majority, for example, accepts no
    task.)"""
    consumer(scripts, FILE_WORKER).stop()  # which declares its queues
    put(channel, "tasks.parked", "task")

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
            proxy = stack.enter_context(closing(Proxy(scripts.amqp_url, without(held))))
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
    limit_queue(broker, scripts.amqp_url, "task_queue", 1)
    scripts.run(NEW_TASK, "fits")
    producer = scripts.run(NEW_TASK, "does not", status=1)
    assert producer.out.all() == []
    assert producer.err.all() == [" [!] 0 message(s) NACKed"]
