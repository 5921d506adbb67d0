"""Publisher confirms while something goes wrong: nothing is lost, and each cause is told once."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import Channel, Confirm

from tests.confirms import SILENCE, Pipe, numbers, send, sent, take_all
from tests.proxy import ACK, Proxy, without
from tests.scripts import NEW_TASKS, SECRET, Scripts, one_line, ready, replaced
from tools.broker import Broker, eventually, free_port, virtual_host_of

LOST = re.compile(r" \[!\] .+:\d+: .+; trying again every second")
NO_MEMORY = " [!] RabbitMQ is short of memory or disk space, and takes no tasks until it has more"
NODE_WITHOUT_ADDRESS = "amqp://guest:guest@nowhere.invalid:5672/%2F"


def sent_again(line: str) -> int:
    """Return how many tasks the script says that it has sent again."""
    told = re.fullmatch(r" \[!\] (\d+) tasks were sent again, and may be in the queue twice", line)
    assert told, line
    return int(told[1])


def test_a_silent_rabbitmq_is_reported(scripts: Scripts, tmp_path: Path) -> None:
    """If no confirm comes for ten seconds, or no answer to the declaration of the queue, the script
    says so, once. When the answers come, it goes on. It waits for the last one, too."""
    held: dict[int, float] = {}  # when the first answer of this kind came
    may_answer = threading.Event()

    def hold(answer: int) -> Callable[[int, bool], bool]:
        def watch(index: int, to_broker: bool) -> bool:
            if index == answer and not to_broker:
                held.setdefault(index, time.monotonic())
                may_answer.wait(60)
            if index == Channel.CloseOk.INDEX:
                time.sleep(1.5)
            return True

        return watch

    answers = (ACK, Confirm.SelectOk.INDEX)  # the second comes when the queue is declared
    proxies = [Proxy(scripts.amqp_url, hold(answer)) for answer in answers]
    running = [send(scripts, tmp_path, 100, "--window", "10", url=proxy.url) for proxy in proxies]
    for script, answer in zip(running, answers, strict=True):
        script.expect_error(SILENCE, timeout=30)
        assert script.err.time_of(SILENCE) - held[answer] > 8
    time.sleep(2)  # they say nothing more
    may_answer.set()
    for script, proxy in zip(running, proxies, strict=True):
        assert script.wait() == 0
        assert (script.out.seen, script.err.seen) == ([sent(100)], [SILENCE])
        proxy.close()


def test_a_lost_connection_loses_no_task(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """Tasks without a confirm are sent again, to the next node that answers; that is counted.

    Neither a node that is down nor a name without an address stops the script.
    """

    def watch(_index: int, _to_broker: bool) -> bool:
        if proxy.to_client[ACK] == 3:
            proxy.close()
        return proxy.to_client[ACK] < 3

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        urls = ",".join([NODE_WITHOUT_ADDRESS, proxy.url, scripts.amqp_url])
        script = send(scripts, tmp_path, 200, "--window", "10", url=urls)
        assert script.wait() == 0
    assert script.out.seen == [sent(200)]
    (told,) = script.err.seen
    tasks = take_all(channel)
    assert set(tasks) == set(numbers(200))
    assert 1 <= len(tasks) - 200 <= sent_again(told) <= 10


def test_a_cause_is_reported_once(scripts: Scripts, tmp_path: Path) -> None:
    """A connection that is lost time after time is one line, and each task is counted once."""
    with closing(Proxy(scripts.amqp_url, without(ACK))) as proxy:
        script = send(scripts, tmp_path, 20, "--window", "10", url=f"{proxy.url},{proxy.url}")
        for times in (1, 2, 3, 4):
            eventually(lambda n=times: proxy.connections >= n, "it connects")  # type: ignore[misc]
            time.sleep(0.5)
            proxy.cut()
        proxy.close()
        script.expect_error(re.compile(".*Connection refused; trying again every second"))
    time.sleep(2)
    assert len(script.err.seen) <= 3
    assert len(set(script.err.seen)) == len(script.err.seen)


@pytest.mark.endurance
@pytest.mark.timeout(300)  # three brokers that are slow to start
def test_three_kills_of_the_broker_lose_no_task(
    own_broker: Broker,
    scripts: Scripts,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """100,000 tasks: each is in the queue at the end. Those that are there twice were counted."""
    count = 100_000

    def connect() -> BlockingChannel:
        return pika.BlockingConnection(pika.URLParameters(scripts.amqp_url)).channel()

    ready(connect())  # declares the queue
    own_broker.sync()
    script = send(scripts, tmp_path, count)
    for kill_at in (10_000, 35_000, 60_000):
        channel = connect()
        eventually(lambda: ready(channel) >= kill_at, f"{kill_at} tasks are sent", 60)  # noqa: B023
        own_broker.kill()
        own_broker.start()
    assert script.wait(60) == 0, str(script)
    assert script.out.seen == [sent(count)]
    *lost, told = script.err.seen
    assert lost
    assert all(LOST.fullmatch(line) for line in lost)
    again = sent_again(told)
    tasks = take_all(connect())
    missing = set(numbers(count)) - set(tasks)
    twice = len(tasks) - len(set(tasks))
    record_property(
        "100,000 tasks and three killed brokers",
        f"{len(missing)} lost, {again} sent again, and {twice} of these are in the queue twice",
    )
    assert not missing
    assert twice < again <= 3 * 1000  # without confirms, what is in between would be lost


def test_the_back_pressure_of_the_broker_stops_the_reading(
    own_broker: Broker, scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """A broker that is short of memory takes no tasks; the script says so, and reads no more.

    Another script's connection gives up again and again. Both report the cause once, and count a
    task once, however often it was sent.
    """
    pipe = Pipe(tmp_path)
    script = scripts.start(NEW_TASKS, "--window", "50", pipe.path)
    pipe.write(b"\n")
    eventually(lambda: ready(channel) == 1, "a task arrives")
    with closing(Proxy(scripts.amqp_url)) as proxy:
        own_broker.rabbitmqctl("set_vm_memory_high_watermark", "0.000001")
        try:
            alarms = "rabbit_alarm:get_alarms()."
            eventually(lambda: "memory" in own_broker.rabbitmqctl("eval", alarms), "it is short")
            url = f"{proxy.url}?blocked_connection_timeout=1"
            impatient = send(scripts, tmp_path, 100, "--window", "50", url=url)
            pipe.write(b"\n")
            script.expect_error(NO_MEMORY)
            taken = fill(pipe, at_least=2 * 50) + 2
            # Two windows, what a pipe holds, and what Python and RabbitMQ read ahead: all of 1 kB
            assert taken < 2 * 50 + 64 + 300
            eventually(lambda: proxy.connections >= 4, "the other one has tried four times")
        finally:
            own_broker.rabbitmqctl("set_vm_memory_high_watermark", "0.6")
        pipe.close()
        assert script.wait() == 0, str(script)
        assert impatient.wait() == 0, str(impatient)
    assert (script.out.seen, impatient.out.seen) == ([sent(taken)], [sent(100)])
    assert script.err.seen == [NO_MEMORY]
    blocked, lost, told = impatient.err.seen
    assert blocked == NO_MEMORY
    assert LOST.fullmatch(lost)
    assert sent_again(told) <= 50
    assert ready(channel) >= taken + 100


def fill(pipe: Pipe, at_least: int) -> int:
    """Write so many lines of 1 kB, and more until the pipe stays full. Return their number."""
    os.set_blocking(pipe.end, False)
    written, last = 0, time.monotonic()
    while written < at_least or time.monotonic() < last + 1:
        try:
            os.write(pipe.end, b"x" * 1023 + b"\n")  # all or nothing
            written, last = written + 1, time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
    return written


def test_what_rabbitmq_refuses_is_one_line(
    broker: Broker, scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """The line names each address that was tried, and what came back. If one of them accepts the
    script, all is well: neither a password that is wrong on one node nor a node that is full stops
    it."""
    nobody = replaced(scripts.amqp_url, user=f"guest:{SECRET}", port=free_port())
    wrong_password = replaced(scripts.amqp_url, user=f"guest:{SECRET}")
    nowhere = replaced(scripts.amqp_url, path="/nowhere")
    urls = [nobody, NODE_WITHOUT_ADDRESS, wrong_password, nowhere]
    with broker.virtual_host(f"full-{os.getpid()}") as full:
        limit = f"vhost-limits/{virtual_host_of(full)}/max-connections"
        broker.api("PUT", limit, {"value": 0})
        urls.append(full)
        line = one_line(send(scripts, tmp_path, 3, url=",".join(urls)))
        assert send(scripts, tmp_path, 3, url=",".join([*urls, scripts.amqp_url])).wait() == 0
    places = [f"{pika.URLParameters(url).host}:{pika.URLParameters(url).port}" for url in urls]
    answers = [
        "Connection refused",
        "Name or service not known|Temporary failure in name resolution",
        "ACCESS_REFUSED - Login was refused",
        "NOT_ALLOWED - vhost nowhere not found",
        "NOT_ALLOWED - .*limit",
    ]
    tried = "; ".join(f"{p}: .*({a}).*" for p, a in zip(places, answers, strict=True))
    assert re.fullmatch(rf" \[!\] No RabbitMQ accepts us: {tried}", line)

    channel.queue_delete("task_queue")
    channel.queue_declare("task_queue", durable=True, arguments={"x-max-length": 5})
    assert "PRECONDITION_FAILED" in one_line(send(scripts, tmp_path, 3))
