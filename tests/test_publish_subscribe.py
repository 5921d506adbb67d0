"""Publish/subscribe: every log to every receiver. That logs come to all who listen, at once
to a file, and to nobody who comes later, and what rabbitmqctl shows, is tested by playing the
lesson."""

from __future__ import annotations

from typing import Any

from pika.adapters.blocking_connection import BlockingChannel

from tests.scripts import EMIT_LOG, RECEIVE_LOGS, Scripts, consumer, take
from tools.broker import Broker, eventually, virtual_host_of


def test_a_receiver_has_a_queue_of_its_own(broker: Broker, scripts: Scripts) -> None:
    """The broker names it, it is exclusive, and it is gone with its receiver, also if that is
    killed."""

    def queues() -> list[dict[str, Any]]:
        path = f"queues/{virtual_host_of(scripts.amqp_url)}?disable_stats=true"
        return list(broker.api("GET", path))

    stopped, killed = consumer(scripts, RECEIVE_LOGS), consumer(scripts, RECEIVE_LOGS)
    eventually(lambda: len({queue["name"] for queue in queues()}) == 2, "two queues")
    for queue in queues():
        assert queue["name"].startswith("amq.gen-")
        assert queue["exclusive"] is True
    stopped.stop()
    eventually(lambda: len(queues()) == 1, "the queue of the first is gone")
    killed.kill()
    eventually(lambda: not queues(), "all queues are gone")


def test_a_log_reaches_whatever_else_is_bound(scripts: Scripts, channel: BlockingChannel) -> None:
    """An emitter knows the exchange alone: any queue may be bound to it."""
    channel.exchange_declare("logs", exchange_type="fanout")
    channel.queue_declare("archive", durable=True)
    channel.queue_bind("archive", "logs")
    scripts.run(EMIT_LOG, "info: kept")
    assert take(channel, "archive")[1] == b"info: kept"


def test_a_log_is_one_line_whatever_it_contains(scripts: Scripts, channel: BlockingChannel) -> None:
    """Line ends, control characters and bytes that are not UTF-8 are printed escaped: a log can
    look like no other one."""
    started = consumer(scripts, RECEIVE_LOGS)
    channel.basic_publish("logs", "", b"one\n [x] forged \x1b[2J caf\xe9 it's \\ all")
    scripts.run(EMIT_LOG, "the last")
    started.expect(" [x] the last")
    assert started.out.seen[:-1] == [r" [x] one\n [x] forged \x1b[2J caf\udce9 it's \ all"]
