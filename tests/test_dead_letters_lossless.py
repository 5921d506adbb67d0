"""Dead letters: from one queue to the next nothing is lost, whatever is killed or deleted."""

from __future__ import annotations

import re
from contextlib import closing

import pytest
from pika.adapters.blocking_connection import BlockingChannel

from tests.proxy import ACK, PUBLISH, Proxy, without
from tests.scripts import (
    FILE_WORKER,
    PARKED,
    LargeNumber,
    Scripts,
    consumer,
    enoent,
    listing,
    put,
    received,
    size,
)
from tools.broker import Broker, eventually


@pytest.mark.parametrize(
    ("name", "option", "source", "target"),
    [
        (FILE_WORKER, "--tries=1", "tasks", "tasks.parked"),
        (PARKED, "--send-back", "tasks.parked", "tasks"),
    ],
    ids=["worker", "parked"],
)
def test_a_task_is_taken_away_once_it_is_stored_elsewhere(
    scripts: Scripts, channel: BlockingChannel, name: str, option: str, source: str, target: str
) -> None:
    """The script waits for the confirm, and acknowledges only then. Killed before, it leaves the
    task in both queues."""
    consumer(scripts, FILE_WORKER).stop()  # which declares the queues
    put(channel, source, "missing")
    with closing(Proxy(scripts.amqp_url, without(ACK))) as proxy:
        moving = scripts.start(name, option, amqp_url=f"{proxy.url}?heartbeat=1")
        eventually(lambda: proxy.to_client[ACK], "RabbitMQ confirms that the task is stored")
        proxy.wait_for_heartbeats()
        assert proxy.to_broker[ACK] == 0
        moving.kill()
    eventually(lambda: size(channel, source) == 1, "the task is back")
    assert size(channel, target) == 1


@pytest.mark.parametrize(("moment", "copies"), [(PUBLISH, 3), (ACK, 4)], ids=["publish", "ack"])
def test_sending_back_loses_nothing_when_it_is_killed(
    scripts: Scripts, channel: BlockingChannel, moment: int, copies: int
) -> None:
    """Killed at its second task, it has sent one back, and the rest is parked or in both."""
    consumer(scripts, FILE_WORKER).stop()
    put(channel, "tasks.parked", "task 0", "task 1", "task 2")

    def watch(_index: int, _to_broker: bool) -> bool:
        if proxy.to_broker[moment] == 2:
            sender.process.kill()
        return proxy.to_broker[moment] < 2

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        sender = scripts.start(PARKED, "--send-back", amqp_url=proxy.url)
        assert sender.wait() == -9
    eventually(lambda: size(channel, "tasks.parked") == 2, "the rest is parked")
    assert size(channel, "tasks") == copies - 2
    listing(scripts, "--send-back")
    assert size(channel, "tasks") == copies


def test_sending_back_goes_on_after_a_task_that_cannot_be_sent(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """It stays parked, and the one behind it is sent back. The status says that not all were."""
    consumer(scripts, FILE_WORKER).stop()
    channel.basic_publish("", "tasks.parked", b"strange", LargeNumber())
    put(channel, "tasks.parked", "good")
    sender = scripts.run(PARKED, "--send-back", status=1)
    assert sender.err.all()[-1] == " [!] 1 of 2 tasks are sent back"
    assert [size(channel, queue) for queue in ("tasks", "tasks.parked")] == [1, 1]


def test_a_task_is_not_lost_in_a_queue_that_is_gone(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """Somebody deletes the queue to which a task is sent: it stays where it is.

    The worker then declares the queue again.
    """
    doing = consumer(scripts, FILE_WORKER)
    channel.queue_delete("tasks.retry")
    put(channel, "tasks", "missing")
    doing.expect_error(" [!] 1 unroutable message(s) returned; trying again every second")
    doing.expect_error(re.compile(r" \[!\] 'missing' failed \(1 of 3\) and is in tasks.retry .*"))
    doing.stop()
    channel.queue_delete("tasks")
    put(channel, "tasks.parked", "task")
    sender = scripts.run(PARKED, "--send-back", status=1)
    assert sender.err.all() == [" [!] 1 unroutable message(s) returned"]
    eventually(lambda: size(channel, "tasks.parked") == 1, "the task is back")


def test_a_dead_letter_waits_for_a_queue_that_is_gone(
    own_broker: Broker, scripts: Scripts, channel: BlockingChannel
) -> None:
    """RabbitMQ keeps it until the other queue is there again and has stored it."""
    name = "rabbit, dead_letter_worker_publisher_confirm_timeout"  # how often it tries
    usual = f"{{ok, Usual}} = application:get_env({name})"
    usually = own_broker.rabbitmqctl("eval", f"{usual}, application:set_env({name}, 500), Usual.")
    try:
        consumer(scripts, FILE_WORKER).stop()
        channel.queue_delete("tasks")
        put(channel, "tasks.retry", "missing", expiration="1")
        eventually(lambda: size(channel, "tasks.retry") == 0, "it has expired")
        consumer(scripts, FILE_WORKER).expect(received("missing"))
    finally:
        own_broker.rabbitmqctl("eval", f"application:set_env({name}, {usually}).")


def test_listing_parked_tasks_changes_nothing(scripts: Scripts, channel: BlockingChannel) -> None:
    """However often one looks, all tasks are there afterwards, if perhaps in another order.

    Each look is a delivery of each task. By default, RabbitMQ 4 would drop them after 21.
    """
    doing = consumer(scripts, FILE_WORKER, "--tries", "1")
    tasks = [f"task {n}" for n in range(40)]
    put(channel, "tasks", *tasks)
    eventually(lambda: size(channel, "tasks.parked") == 40, "all are parked")
    doing.stop()
    expected = [line for t in tasks for line in (f" [x] '{t}'", f"     T {enoent(t)}")]
    assert listing(scripts) == expected
    for _ in range(22):  # as parked.py does, but faster
        look = channel.connection.channel()
        assert all(look.basic_get("tasks.parked")[0] for _ in range(5))
        look.close()
    eventually(lambda: size(channel, "tasks.parked") == 40, "all are back")
    assert sorted(listing(scripts)) == sorted(expected)
