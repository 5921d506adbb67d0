"""How all consumers live on: once one has waited for messages, nothing RabbitMQ does ends it."""

from __future__ import annotations

import re
import time
from contextlib import closing
from itertools import pairwise

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import BasicProperties, Channel, Connection

from tests.proxy import Proxy
from tests.scripts import CONSUMERS, Scripts, consumer, expect_waiting, one_line, start
from tools.broker import Broker, eventually, virtual_host_of

LOST = re.compile(r" \[!\] .+; trying again every second")
RECEIVE, WORKER, LOGS, DIRECT, TOPIC, SERVER, _PARKING = CONSUMERS


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_consumers_outlive_a_broker_restart(
    own_broker: Broker, scripts: Scripts, amqp_url: str, end: str
) -> None:
    """Each says in one line that the broker is lost, waits, and goes on by itself; so does one
    that starts before the broker. A worker and a server in the middle of their work do, too."""
    late = {name: consumer(scripts, name) for name in CONSUMERS}
    client = scripts.start("rpc/rpc_client.py", "--timeout", "60", *["33"] * 10)
    late[SERVER].expect(" [.] fib(33)")
    own_broker.sync()
    scripts.run("work_queues/new_task.py", "task........")
    late[WORKER].expect(" [x] Received 'task........'")

    getattr(own_broker, end)()
    try:
        one_line(client)
        early = {name: start(scripts, name) for name in CONSUMERS}
        for script in [*early.values(), *(late[name] for name in CONSUMERS if name != SERVER)]:
            script.expect_error(LOST)
    finally:
        own_broker.start()

    for name in CONSUMERS:
        expect_waiting(late[name], count=2)
        expect_waiting(early[name])
    for script in [*late.values(), *early.values()]:
        script.expect_error(LOST)
        told = [line for line in script.err.seen if line.startswith(" [!]")]
        assert all(LOST.fullmatch(line) for line in told)
        assert all(one != next_one for one, next_one in pairwise(told)), "no trouble is said twice"

    with closing(pika.BlockingConnection(pika.URLParameters(amqp_url))) as connection:
        channel = connection.channel()
        for i in range(2):
            channel.basic_publish("", "hello", f"message {i}".encode())
            channel.basic_publish("", "task_queue", f"task {i}".encode())
        for exchange in ("logs", "direct_logs", "topic_logs"):
            channel.basic_publish(exchange, "info", b"log")

    def printed_by(name: str) -> set[str]:
        return {*late[name].out.seen, *early[name].out.seen}

    messages = {f" [x] Received 'message {i}'" for i in range(2)}
    eventually(lambda: messages <= printed_by(RECEIVE), "both messages are printed")
    tasks = {f" [x] Received 'task {i}'" for i in range(2)}
    tasks |= {" [x] Received 'task........' (redelivered)"}
    eventually(lambda: tasks <= printed_by(WORKER), "all tasks are done, that in hand once more")
    for name, line in ((LOGS, " [x] log"), (DIRECT, " [x] info:log"), (TOPIC, " [x] info:log")):
        late[name].expect(line)
        early[name].expect(line)
    assert scripts.run("rpc/rpc_client.py", "7").out.seen[-1] == " [.] Got 13"


def test_a_channel_that_the_broker_closes_is_opened_again(scripts: Scripts) -> None:
    """An error that closes the channel of a consumer that has worked is no reason to end."""
    error = Channel.Close(406, "PRECONDITION_FAILED - for a test", 0, 0)
    told = re.compile(r" \[!\] .*PRECONDITION_FAILED - for a test.*; trying again every second")
    with closing(
        Proxy(scripts.amqp_url, lambda index, _to_broker: index != Channel.CloseOk.INDEX)
    ) as proxy:
        consumers = {name: consumer(scripts, name, proxy.url) for name in CONSUMERS}
        proxy.say(error)
        for script in consumers.values():
            script.expect_error(told)
            expect_waiting(script, count=2)


def test_a_connection_that_an_administrator_closes_is_made_again(
    broker: Broker, scripts: Scripts
) -> None:
    """Closed on the management page, each consumer connects again."""
    consumers = {name: consumer(scripts, name) for name in CONSUMERS}
    path = f"vhosts/{virtual_host_of(scripts.amqp_url)}/connections"
    found = eventually(
        lambda: [c for c in [broker.api("GET", path)] if len(c) == len(CONSUMERS)],
        "the broker shows all connections",
    )[0]
    for connection in found:
        broker.api("DELETE", f"connections/{connection['name']}")
    for script in consumers.values():
        script.expect_error(re.compile(r" \[!\] .*CONNECTION_FORCED.*; trying again every second"))
        expect_waiting(script, count=2)


def test_a_queue_that_is_deleted_is_declared_again(
    broker: Broker, scripts: Scripts, channel: BlockingChannel
) -> None:
    """RabbitMQ cancels the consumers of a deleted queue. They say so once, and start anew, each
    time. The old connection is closed."""
    queues = {RECEIVE: "hello", WORKER: "task_queue", SERVER: "rpc_queue"}
    consumers = {name: consumer(scripts, name) for name in queues}
    for times in (2, 3):
        for name, script in consumers.items():
            channel.queue_delete(queues[name])
            expect_waiting(script, count=times)
    cancelled = " [!] RabbitMQ cancelled the consumer; trying again every second"
    for script in consumers.values():
        assert script.err.seen == [cancelled]
    path = f"vhosts/{virtual_host_of(scripts.amqp_url)}/connections"
    eventually(lambda: len(broker.api("GET", path)) == 4, "their connections, and the test's own")
    scripts.run("hello_world/send.py")
    consumers[RECEIVE].expect(" [x] Received 'Hello World!'")


def test_a_task_that_takes_longer_than_the_broker_waits_ends_no_worker(
    own_broker: Broker, scripts: Scripts
) -> None:
    """RabbitMQ waits for an acknowledgement for half an hour, here for a second. Before 4.3 it then
    closes the channel, and the worker gets the task again. From 4.3 on, it waits for as long as it
    takes, if the queue is a classic one."""

    def set_time(milliseconds: int, tick: int) -> None:
        for name, value in (("consumer_timeout", milliseconds), ("channel_tick_interval", tick)):
            own_broker.rabbitmqctl("eval", f"application:set_env(rabbit, {name}, {value}).")

    set_time(1000, 500)
    try:
        worker = consumer(scripts, WORKER)
        scripts.run("work_queues/new_task.py", "long....")
        if tuple(map(int, own_broker.version.split(".")[:2])) < (4, 3):
            worker.expect_error(re.compile(r" \[!\] .*delivery acknowledgement.*timed out.*"))
            worker.expect(CONSUMERS[WORKER], count=2)
            worker.expect(" [x] Received 'long....' (redelivered)")
        else:
            worker.expect(" [x] Done")
            assert worker.err.seen == []
        assert worker.process.poll() is None
    finally:
        set_time(1_800_000, 60_000)


class Unreadable(BasicProperties):
    """Properties with a header that pika 1.4.4 cannot decode: a time after the year 9999."""

    def encode(self) -> list[bytes]:
        """Return the bytes: pika writes a number, and this makes it a time."""
        pieces: list[bytes] = super().encode()  # type: ignore[no-untyped-call]
        return [b"".join(pieces).replace(b"\x04whenl", b"\x04whenT")]


def test_a_message_that_pika_cannot_read_is_said_once(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """The worker gets it again and again, because no script can acknowledge it. The reason is
    said once, and the worker works again when the message is gone."""
    with closing(Proxy(scripts.amqp_url)) as proxy:
        worker = consumer(scripts, WORKER, proxy.url)
        unreadable = Unreadable(headers={"when": 2**62})  # type: ignore[no-untyped-call]
        channel.basic_publish("", "task_queue", b"", unreadable)
        eventually(lambda: proxy.connections == 5, "it has reconnected four times")
        assert len(worker.err.seen) == 1
        assert LOST.fullmatch(worker.err.seen[0])
        eventually(lambda: channel.queue_purge("task_queue").method.message_count, "it is removed")
        scripts.run("work_queues/new_task.py", "readable")
        worker.expect(" [x] Done")


def test_a_worker_that_loses_its_connection_reconnects_while_it_works(scripts: Scripts) -> None:
    """It does not wait until the task in hand is done, and takes no other task before."""
    with closing(Proxy(scripts.amqp_url)) as proxy:
        worker = consumer(scripts, WORKER, proxy.url)
        scripts.run("work_queues/new_task.py", "long........")
        worker.expect(" [x] Received 'long........'")
        proxy.cut()
        begin = time.monotonic()
        worker.expect(CONSUMERS[WORKER], count=2)
        assert time.monotonic() - begin < 5
        assert worker.out.seen[-2:] == [" [x] Received 'long........'", CONSUMERS[WORKER]]
        worker.expect(" [x] Received 'long........' (redelivered)")


def test_a_connection_that_is_lost_while_it_is_made_is_no_wrong_password(scripts: Scripts) -> None:
    """A consumer that starts while RabbitMQ goes down tries again. (pika supposes that the
    password was wrong.)"""
    losing: list[str] = []

    def watch(index: int, _to_broker: bool) -> bool:
        if index == Connection.StartOk.INDEX and losing:
            losing.clear()
            proxy.cut()
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        for name in CONSUMERS:
            losing.append(name)
            script = start(scripts, name, proxy.url)
            script.expect_error(LOST)
            expect_waiting(script)
            script.stop()
