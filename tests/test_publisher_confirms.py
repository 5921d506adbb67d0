"""Publisher confirms: thousands of tasks a second, each confirmed, and never more than a window."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import Basic

from tests.confirms import REJECTED, Pipe, numbers, send, sent, take_all
from tests.proxy import ACK, PUBLISH, Proxy, without
from tests.scripts import NEW_TASKS, Scripts, limit_queue, ready, take
from tools import TIMEOUT
from tools.broker import Broker, eventually


@pytest.mark.parametrize("window", [1, 10, 100])
def test_the_window_is_never_exceeded(scripts: Scripts, tmp_path: Path, window: int) -> None:
    """As long as no confirm comes, the script sends as many tasks as the window holds, no more."""
    may_confirm = threading.Event()
    with closing(
        Proxy(scripts.amqp_url, lambda index, _: index != ACK or may_confirm.wait(TIMEOUT))
    ) as proxy:
        url = f"{proxy.url}?heartbeat=1"
        script = send(scripts, tmp_path, 3 * window, "--window", str(window), url=url)
        eventually(lambda: proxy.to_broker[PUBLISH] >= window, "the window is full")
        proxy.wait_for_heartbeats()
        assert proxy.to_broker[PUBLISH] == window
        may_confirm.set()
        assert script.wait() == 0
    assert script.out.seen == [sent(3 * window)]
    assert proxy.to_broker[PUBLISH] == 3 * window


def test_one_confirm_may_be_for_several_tasks(scripts: Scripts, tmp_path: Path) -> None:
    """A confirm with `multiple` is for all tasks up to its own, and for none behind it."""
    with closing(Proxy(scripts.amqp_url, without(ACK))) as proxy:
        script = send(scripts, tmp_path, 30, "--window", "10", url=proxy.url)
        eventually(lambda: proxy.to_broker[PUBLISH] == 10, "the window is full")
        proxy.say(Basic.Ack(delivery_tag=3))  # not in turn
        eventually(lambda: proxy.to_broker[PUBLISH] == 11, "there is room for one more")
        proxy.say(Basic.Ack(delivery_tag=5, multiple=True))  # 1, 2, 4 and 5
        eventually(lambda: proxy.to_broker[PUBLISH] == 15, "there is room for four more")
        script.stop()
    assert script.err.seen == [" [!] Stopped. 5 tasks are confirmed. Go on from line 6"]


def test_several_tasks_may_be_rejected_at_once(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """A negative confirm may be for several, too. These are sent again, and no others."""
    with closing(Proxy(scripts.amqp_url, without(ACK))) as proxy:
        script = send(scripts, tmp_path, 10, url=proxy.url)
        eventually(lambda: ready(channel) == 10, "all are in the queue")
        proxy.say(Basic.Ack(delivery_tag=2))
        proxy.say(Basic.Nack(delivery_tag=5, multiple=True))  # 1, 3, 4 and 5
        proxy.say(Basic.Ack(delivery_tag=10, multiple=True))
        eventually(lambda: ready(channel) == 14, "they are in the queue again")
        proxy.say(Basic.Ack(delivery_tag=14, multiple=True))
        assert script.wait() == 0
    assert script.err.seen == [REJECTED]
    again = Counter(take_all(channel)) - Counter(numbers(10))
    assert sorted(again) == [b"1", b"3", b"4", b"5"]


def test_a_task_that_comes_back_is_sent_again(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """If the queue is deleted, the script declares it again, and sends those again that come back.

    Here the queue is deleted before it has stored a task. So at last all tasks are in it.
    """

    def watch(index: int, _to_broker: bool) -> bool:
        if index == PUBLISH and proxy.to_broker[PUBLISH] == 1:
            channel.queue_delete("task_queue")
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        script = send(scripts, tmp_path, 100, "--window", "7", url=proxy.url)
        assert script.wait() == 0
    assert script.out.seen == [sent(100)]
    assert re.fullmatch(r" \[!] .*: The queue is gone; trying again .*", script.err.seen[0])
    assert set(take_all(channel)) == set(numbers(100))


def test_a_full_queue_gets_the_rest_later(
    broker: Broker, scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """What a full queue rejects is sent again every second, until somebody makes room for it. This
    is reported once, and if the queue is full again later, it is reported again."""
    limit_queue(broker, scripts.amqp_url, "task_queue", 10)
    pipe = Pipe(tmp_path)
    script = scripts.start(NEW_TASKS, "--window", "20", pipe.path)
    done: list[bytes] = []
    for times in (1, 2):
        pipe.write(b"".join(b"%d\n" % n for n in range(20 * times - 19, 20 * times + 1)))
        script.expect_error(REJECTED, count=times)
        done += [take(channel, "task_queue")[1] for _ in range(20)]
        time.sleep(6 * (times == 1))  # the script forgets the trouble after three calm seconds
    pipe.close()
    assert script.wait() == 0
    assert sorted(done) == sorted(numbers(40))  # each once
    assert script.err.seen == [REJECTED] * 2


def peak_memory(scripts: Scripts, channel: BlockingChannel, folder: Path, count: int) -> int:
    """Send so many tasks through a pipe, and return the script's peak of memory, in kB."""
    folder.mkdir()
    pipe = Pipe(folder)
    script = scripts.start(NEW_TASKS, "--window", "100", pipe.path)
    for _ in range(count // 500):
        pipe.write((b"x" * 199 + b"\n") * 500)
    eventually(lambda: ready(channel) == count, "all tasks arrive", timeout=60)
    status = Path(f"/proc/{script.process.pid}/status").read_text()
    pipe.close()
    assert script.wait() == 0
    channel.queue_purge("task_queue")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_tasks(
    scripts: Scripts,
    channel: BlockingChannel,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Twenty times as many lines, of 5 MB together, need no more memory."""
    few = peak_memory(scripts, channel, tmp_path / "few", 1000)
    many = peak_memory(scripts, channel, tmp_path / "many", 20_000)
    record_property("memory for 1,000 and for 20,000 tasks", f"{few} kB, {many} kB")
    assert many < few + 3000


@pytest.mark.speed
def test_it_is_twenty_times_as_fast_as_one_confirm_at_a_time(
    scripts: Scripts,
    channel: BlockingChannel,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """With the default window of 1000, beside a window of 1. They take turns, and it is the best of
    five: whatever else runs on the machine makes the larger window slower, and not the other."""

    def rate(tasks: int, window: int) -> float:
        """Return how many a second are confirmed, after a first one."""
        (folder := tmp_path / f"{time.monotonic()}").mkdir()
        pipe = Pipe(folder)
        script = scripts.start(NEW_TASKS, f"--window={window}", pipe.path)
        pipe.write(b"first\n")
        eventually(lambda: ready(channel) == 1, "it is connected")
        begin = time.monotonic()
        pipe.write(b"x\n" * tasks)
        pipe.close()
        script.expect(sent(tasks + 1), timeout=60)
        channel.queue_purge("task_queue")
        return tasks / (script.out.times[-1] - begin)

    rounds = [(rate(1000, 1), rate(40_000, 1000)) for _ in range(5)]
    slow, fast = max(rounds, key=lambda rates: rates[1] / rates[0])
    record_property(
        "publishing with a window of 1 and of 1000",
        f"{slow:.0f} and {fast:.0f} tasks/s: {fast / slow:.0f} times",
    )
    assert fast / slow >= 20
