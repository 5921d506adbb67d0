"""How all consumers live on: once one has waited for messages, nothing RabbitMQ does ends it."""

from __future__ import annotations

import os
import re
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import BasicProperties, Channel, Connection

from tests.proxy import Proxy, without
from tests.scripts import (
    CONSUMERS,
    EMIT_TOPIC,
    FILE_WORKER,
    LOST,
    NEW_TASK,
    RECEIVE,
    RECEIVE_TOPIC,
    RPC_CLIENT,
    RPC_SERVER,
    SEND,
    WORKER,
    Scripts,
    consumer,
    consumer_timeout,
    expect_waiting,
    one_line,
    put,
    received,
    size,
)
from tools.broker import Broker, eventually, virtual_host_of

SHAPES = [RECEIVE, RECEIVE_TOPIC, WORKER, RPC_SERVER]  # all consumers reconnect to the letter so


def test_consumers_outlive_a_killed_broker(
    own_broker: Broker, scripts: Scripts, amqp_url: str
) -> None:
    """Each says in one line that the broker is lost, waits, and goes on by itself; so does one
    that starts before the broker. A worker and a server in the middle of their work do, too. (The
    lessons restart RabbitMQ politely.)"""
    late = {name: consumer(scripts, name) for name in SHAPES}
    client = scripts.start(RPC_CLIENT, "--timeout", "60", *["33"] * 10)
    late[RPC_SERVER].expect(" [.] fib(33)")
    own_broker.sync()
    scripts.run(NEW_TASK, "task....")
    late[WORKER].expect(received("task...."))

    own_broker.kill()
    try:
        one_line(client)
        early = scripts.launch(*SHAPES)
        for script in [*early.values(), *(late[name] for name in SHAPES if name != RPC_SERVER)]:
            script.expect_error(LOST)
    finally:
        own_broker.start()

    for name in SHAPES:
        expect_waiting(late[name], count=2)
        expect_waiting(early[name])
    for script in [*late.values(), *early.values()]:
        script.expect_error(LOST)
        told = [line for line in script.err.seen if line.startswith(" [!]")]
        assert all(LOST.fullmatch(line) for line in told)
        assert all(one != next_one for one, next_one in pairwise(told)), "no trouble is said twice"
        assert not any(re.search(r"0x[0-9a-f]{6}", line) for line in told), "an object's address"

    channel = pika.BlockingConnection(pika.URLParameters(amqp_url)).channel()
    put(channel, "hello", "message 0", "message 1")
    put(channel, "task_queue", "task 0", "task 1")
    scripts.run(EMIT_TOPIC, "info", "log")

    def printed_by(name: str) -> set[str]:
        return {*late[name].out.seen, *early[name].out.seen}

    messages = {received(f"message {i}") for i in range(2)}
    eventually(lambda: messages <= printed_by(RECEIVE), "both messages are printed")
    tasks = {received(f"task {i}") for i in range(2)} | {received("task....", redelivered=True)}
    eventually(lambda: tasks <= printed_by(WORKER), "all tasks are done, that in hand once more")
    for receivers in (late, early):
        receivers[RECEIVE_TOPIC].expect(" [x] info:log")
    assert scripts.run(RPC_CLIENT, "7").out.seen[-1] == " [.] Got 13"


def test_a_channel_that_the_broker_closes_is_opened_again(scripts: Scripts) -> None:
    """An error that closes the channel of a consumer that has worked is no reason to end."""
    error = Channel.Close(406, "PRECONDITION_FAILED - for a test", 0, 0)
    told = re.compile(r" \[!\] .*PRECONDITION_FAILED - for a test.*; trying again every second")
    with closing(Proxy(scripts.amqp_url, without(Channel.CloseOk.INDEX))) as proxy:
        consumers = [consumer(scripts, name, amqp_url=proxy.url) for name in SHAPES]
        proxy.say(error)
        for script in consumers:
            script.expect_error(told)
            expect_waiting(script, count=2)


def test_a_connection_that_an_administrator_closes_is_made_again(
    own_broker: Broker, scripts: Scripts
) -> None:
    """Closed with rabbitmqctl, or on the management page, each consumer connects again."""
    consumers = [consumer(scripts, name) for name in SHAPES]
    virtual_host = virtual_host_of(scripts.amqp_url)
    own_broker.rabbitmqctl("close_all_connections", "--vhost", virtual_host, "for a test")
    for script in consumers:
        script.expect_error(re.compile(r" \[!\] .*CONNECTION_FORCED.*; trying again every second"))
        expect_waiting(script, count=2)


def test_a_queue_that_is_deleted_is_declared_again(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """RabbitMQ cancels the consumers of a deleted queue. They say so once, and start anew, each
    time. The old connection is closed."""
    queues = {RECEIVE: "hello", WORKER: "task_queue", RPC_SERVER: "rpc_queue"}
    with closing(Proxy(scripts.amqp_url)) as proxy:
        consumers = [consumer(scripts, name, amqp_url=proxy.url) for name in queues]
        for times in (2, 3):
            for queue in queues.values():
                channel.queue_delete(queue)
            for script in consumers:
                expect_waiting(script, count=times)
        assert proxy.to_broker[Connection.Close.INDEX] == 2 * len(queues)
        for script in consumers:
            cancelled = " [!] RabbitMQ cancelled the consumer; trying again every second"
            assert script.err.seen == [cancelled]
        scripts.run(SEND)
        consumers[0].expect(received("Hello World!"))


def test_a_task_that_takes_longer_than_the_broker_waits_ends_no_worker(
    own_broker: Broker, scripts: Scripts
) -> None:
    """RabbitMQ waits for an acknowledgement for half an hour, here for half a second. Before 4.3 it
    then closes the channel, and the worker gets the task again. From 4.3 on, it waits for as long
    as it takes, if the queue is a classic one."""
    with consumer_timeout(own_broker, 500):
        worker = consumer(scripts, WORKER)
        scripts.run(NEW_TASK, "long..")
        if own_broker.release < (4, 3):
            worker.expect_error(re.compile(r" \[!\] .*delivery acknowledgement.*timed out.*"))
            worker.expect(CONSUMERS[WORKER], count=2)
            worker.expect(received("long..", redelivered=True))
        else:
            worker.expect(" [x] Done")
            assert worker.err.seen == []
        assert worker.process.poll() is None


def test_a_task_that_fails_after_that_is_in_one_queue(
    own_broker: Broker, scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """When RabbitMQ has closed the channel, the task is in its queue again. So the worker of lesson
    8 sends no copy to another queue, and says why the channel was closed."""
    if own_broker.release >= (4, 3):
        pytest.skip("RabbitMQ 4.3 does not close the channel any more")
    os.mkfifo(gate := tmp_path / "gate")  # to open it takes until we write to it
    with consumer_timeout(own_broker, 500):
        worker = consumer(scripts, FILE_WORKER)
        put(channel, "tasks", str(gate))
        worker.expect(received(str(gate)))
        eventually(lambda: size(channel, "tasks") == 1, "RabbitMQ has put it back")
        gate.write_bytes(b"\xff")  # this is no text, so the work fails
        worker.expect_error(re.compile(r" \[!\] .*delivery acknowledgement.*timed out.*"))
        worker.expect(received(str(gate), redelivered=True))
        assert size(channel, "tasks.retry") == 0
        worker.kill()


class Unreadable(BasicProperties):
    """Properties with a header that pika 1.4.4 cannot decode: a time after the year 9999."""

    def encode(self) -> list[bytes]:
        """Return the bytes: pika writes a number, and this makes it a time."""
        pieces: list[bytes] = super().encode()  # type: ignore[no-untyped-call]
        return [b"".join(pieces).replace(b"\x04whenl", b"\x04whenT")]


def test_a_cause_that_lasts_is_said_once(scripts: Scripts, channel: BlockingChannel) -> None:
    """A message that pika cannot read comes again and again, because no script can acknowledge it.
    The worker says why once, and works again when the message is gone."""
    with closing(Proxy(scripts.amqp_url)) as proxy:
        worker = consumer(scripts, WORKER, amqp_url=proxy.url)
        unreadable = Unreadable(headers={"when": 2**62})  # type: ignore[no-untyped-call]
        channel.basic_publish("", "task_queue", b"", unreadable)
        eventually(lambda: proxy.connections == 3, "it has reconnected twice")
        assert len(worker.err.seen) == 1
        assert LOST.fullmatch(worker.err.seen[0])
        eventually(lambda: channel.queue_purge("task_queue").method.message_count, "it is removed")
        scripts.run(NEW_TASK, "readable")
        worker.expect(" [x] Done")


def test_a_worker_that_loses_its_connection_reconnects_while_it_works(scripts: Scripts) -> None:
    """It does not wait until the task in hand is done, and takes no other task before."""
    with closing(Proxy(scripts.amqp_url)) as proxy:
        worker = consumer(scripts, WORKER, amqp_url=proxy.url)
        scripts.run(NEW_TASK, "long.....")
        worker.expect(received("long....."))
        proxy.cut()
        begin = time.monotonic()
        worker.expect(CONSUMERS[WORKER], count=2)
        assert time.monotonic() - begin < 4.5, "a second or two, and less than the task takes"
        assert worker.out.seen[-2:] == [received("long....."), CONSUMERS[WORKER]]
        worker.expect(received("long.....", redelivered=True))


def test_a_connection_that_is_lost_while_it_is_made_is_no_wrong_password(scripts: Scripts) -> None:
    """A consumer that starts while RabbitMQ goes down tries again. (pika supposes that the
    password was wrong.)"""

    def watch(index: int, _to_broker: bool) -> bool:
        if index == Connection.StartOk.INDEX and proxy.to_broker[index] == 1:
            proxy.cut()
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        script = scripts.start(RECEIVE, amqp_url=proxy.url)
        script.expect_error(LOST)
        expect_waiting(script)
