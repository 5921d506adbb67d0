"""Publish/subscribe: every log to every receiver."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pika.adapters.blocking_connection import BlockingChannel

from tests.scripts import EMIT_LOG, LOGS_WAITING, RECEIVE_LOGS, Scripts, consumer, take
from tools.broker import Broker, eventually, virtual_host_of


def emit(scripts: Scripts, *logs: str) -> None:
    """Emit these logs, one after the other."""
    for log in logs:
        emitted = scripts.run(EMIT_LOG, log)
        assert emitted.out.all() == [f" [x] Sent '{log}'"]
        assert emitted.err.all() == []


def queues(broker: Broker, amqp_url: str) -> list[dict[str, Any]]:
    """Return the queues of a virtual host, as the broker describes them."""
    return list(broker.api("GET", f"queues/{virtual_host_of(amqp_url)}?disable_stats=true"))


def test_every_receiver_prints_every_log(scripts: Scripts) -> None:
    """All who listen get the same logs, in the order in which they were emitted."""
    receivers = [consumer(scripts, RECEIVE_LOGS) for _ in range(3)]
    scripts.run(EMIT_LOG)
    emit(scripts, "warning: it is late", "error: 你好")
    for each in receivers:
        each.expect(" [x] error: 你好")
        expected = [" [x] info: Hello World!", " [x] warning: it is late", " [x] error: 你好"]
        assert each.out.seen == expected


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_receiver_has_a_queue_of_its_own(
    broker: Broker, scripts: Scripts, amqp_url: str, end: str
) -> None:
    """The broker names it, it is exclusive, and it is gone with its receiver."""
    first, second = consumer(scripts, RECEIVE_LOGS), consumer(scripts, RECEIVE_LOGS)
    eventually(lambda: len(queues(broker, amqp_url)) == 2, "two queues")
    found = queues(broker, amqp_url)
    assert found[0]["name"] != found[1]["name"]
    for queue in found:
        assert queue["name"].startswith("amq.gen-")
        assert queue["exclusive"] is True
    getattr(first, end)()
    eventually(lambda: len(queues(broker, amqp_url)) == 1, "the queue of the first is gone")
    getattr(second, end)()
    eventually(lambda: not queues(broker, amqp_url), "all queues are gone")


def test_a_log_that_nobody_listens_to_is_dropped(
    broker: Broker, scripts: Scripts, amqp_url: str
) -> None:
    """To emit it is no error; it waits nowhere, and a later receiver does not get it."""
    emit(scripts, "info: nobody hears this")
    assert queues(broker, amqp_url) == []
    late = consumer(scripts, RECEIVE_LOGS)
    emit(scripts, "info: and this is heard")
    late.expect(" [x] info: and this is heard")
    assert late.out.seen == [" [x] info: and this is heard"]


def test_one_receiver_writes_to_disk_and_another_shows_the_screen(
    scripts: Scripts, tmp_path: Path
) -> None:
    """Both have the same lines; the file holds them at once, even if its receiver is killed, and
    it holds logs only."""
    file = tmp_path / "logs_from_rabbit.log"
    with file.open("wb") as disk:
        to_disk = scripts.start(RECEIVE_LOGS, stdout=disk)
    to_disk.expect_error(LOGS_WAITING)
    to_screen = consumer(scripts, RECEIVE_LOGS)
    logs = [f"info: log {i}" for i in range(3)]
    expected = "".join(f" [x] {log}\n" for log in logs)
    emit(scripts, *logs)
    to_screen.expect(" [x] info: log 2")
    eventually(lambda: file.read_text() == expected, "the file has all lines at once")
    to_disk.kill()
    assert file.read_text() == expected
    assert to_screen.out.seen == expected.splitlines()
    assert to_disk.err.seen == [LOGS_WAITING]


def test_a_late_receiver_gets_what_is_emitted_from_then_on(scripts: Scripts) -> None:
    """What was emitted before a receiver was there is not for it."""
    early = consumer(scripts, RECEIVE_LOGS)
    emit(scripts, "info: one")
    late = consumer(scripts, RECEIVE_LOGS)
    emit(scripts, "info: two")
    early.expect(" [x] info: two")
    late.expect(" [x] info: two")
    assert early.out.seen == [" [x] info: one", " [x] info: two"]
    assert late.out.seen == [" [x] info: two"]


def test_rabbitmqctl_shows_the_exchange_and_a_binding_for_each_receiver(
    own_broker: Broker, scripts: Scripts, amqp_url: str
) -> None:
    """list_exchanges has a fanout called logs; list_bindings has each receiver's queue."""
    receivers = [consumer(scripts, RECEIVE_LOGS) for _ in range(2)]
    virtual_host = virtual_host_of(amqp_url)
    exchanges = own_broker.rabbitmqctl("-q", "-p", virtual_host, "list_exchanges")
    assert "logs\tfanout" in exchanges.splitlines()
    bindings = own_broker.rabbitmqctl("-q", "-p", virtual_host, "list_bindings")
    bound = re.findall(r"^logs\texchange\t(amq\.gen-\S+)\tqueue\t", bindings, re.MULTILINE)
    assert sorted(bound) == sorted(queue["name"] for queue in queues(own_broker, amqp_url))
    assert len(bound) == len(receivers)


def test_a_log_reaches_whatever_else_is_bound(scripts: Scripts, channel: BlockingChannel) -> None:
    """An emitter knows the exchange alone: any queue may be bound to it."""
    channel.exchange_declare("logs", exchange_type="fanout")
    channel.queue_declare("archive", durable=True)
    channel.queue_bind("archive", "logs")
    emit(scripts, "info: kept")
    assert take(channel, "archive")[1] == b"info: kept"


def test_a_log_is_one_line_whatever_it_contains(scripts: Scripts, channel: BlockingChannel) -> None:
    """Line ends, control characters and bytes that are not UTF-8 are printed escaped: a log can
    look like no other one."""
    started = consumer(scripts, RECEIVE_LOGS)
    channel.basic_publish("logs", "", b"one\n [x] forged \x1b[2J caf\xe9 it's \\ all")
    emit(scripts, "the last")
    started.expect(" [x] the last")
    assert started.out.seen[:-1] == [r" [x] one\n [x] forged \x1b[2J caf\udce9 it's \ all"]
