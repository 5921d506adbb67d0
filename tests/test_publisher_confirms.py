"""Publisher confirms: thousands of tasks a second, none lost."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import tty
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import IO

import pexpect
import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import Basic

from tests.proxy import ACK, PUBLISH, Proxy
from tests.scripts import SECRET, Scripts, full_pipe, one_line, replaced
from tools import ROOT, environment
from tools.broker import Broker, eventually, free_port, virtual_host_of

NEW_TASKS = "publisher_confirms/new_tasks.py"
LOST = re.compile(r" \[!\] .+; trying again every second")
REJECTED = " [!] The queue rejects tasks, perhaps because it is full; trying again every second"
NO_MEMORY = " [!] RabbitMQ is short of memory or disk space, and takes no tasks until it has more"
NO_CONFIRM = " [!] No confirm for 10 seconds; still waiting"
NODE_WITHOUT_ADDRESS = "amqp://guest:guest@nowhere.invalid:5672/%2F"


def sent(tasks: int) -> str:
    """Return the line in which the script says that it has sent so many tasks."""
    return f" [x] Sent {tasks} tasks"


def numbers(count: int) -> list[bytes]:
    """Return the numbers from 1 as tasks."""
    return [b"%d" % number for number in range(1, count + 1)]


def numbered_lines(folder: Path, count: int) -> str:
    """Write a file with the numbers from 1, each in a line, and return its path."""
    path = folder / f"{count} lines"
    path.write_bytes(b"\n".join(numbers(count)))
    return str(path)


class Pipe:
    """A pipe with a name. The script that reads it waits for more, until it is closed."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "pipe")
        os.mkfifo(self.path)
        self._end = os.open(self.path, os.O_RDWR)  # with O_WRONLY, this would wait for a reader

    def write(self, data: bytes) -> None:
        """Write, and wait while the pipe is full."""
        while data:
            data = data[os.write(self._end, data) :]

    def fill(self, at_least: int) -> int:
        """Write so many lines of 1 kB, and more until the pipe stays full. Return their number."""
        os.set_blocking(self._end, False)
        written, last = 0, time.monotonic()
        while written < at_least or time.monotonic() < last + 1:
            try:
                os.write(self._end, b"x" * 1023 + b"\n")  # all or nothing
                written, last = written + 1, time.monotonic()
            except BlockingIOError:
                time.sleep(0.01)
        return written

    def close(self) -> None:
        """Let the script see the end."""
        os.close(self._end)


def ready(channel: BlockingChannel) -> int:
    """Return how many tasks are in the queue, as the broker counts them."""
    return int(channel.queue_declare("task_queue", durable=True).method.message_count)


def limit_queue(broker: Broker, scripts: Scripts, length: int) -> None:
    """Let the queue reject tasks as soon as it has so many."""
    full = {"max-length": length, "overflow": "reject-publish"}
    policy = {"pattern": ".*", "definition": full, "apply-to": "queues"}
    broker.api("PUT", f"policies/{virtual_host_of(scripts.amqp_url)}/full", policy)


def take(channel: BlockingChannel, count: int) -> list[bytes]:
    """Take so many tasks out of the queue, while more arrive."""
    tasks: list[bytes] = []

    def enough() -> bool:
        method, _properties, body = channel.basic_get("task_queue", auto_ack=True)
        tasks.extend([body or b""] * bool(method))
        return len(tasks) >= count

    eventually(enough, f"{count} tasks are done")
    return tasks


def take_all(channel: BlockingChannel) -> list[bytes]:
    """Take all tasks out of the queue."""
    tasks: list[bytes] = []
    count = ready(channel)
    if count:
        for _method, _properties, body in channel.consume("task_queue", auto_ack=True):
            tasks.append(body or b"")
            if len(tasks) == count:
                break
        channel.cancel()
    return tasks


def test_each_line_is_a_task(scripts: Scripts, channel: BlockingChannel, tmp_path: Path) -> None:
    """In the order of the file, as bytes, without the ends of the lines. Tasks are persistent."""
    tasks = [
        b"first",
        b"",
        b"  spaces ",
        "错误".encode(),
        b"\xff\xfe\x00\r",
        b"x" * 300_000,
        b"last",
    ]
    (tmp_path / "tasks").write_bytes(b"\n".join(tasks))
    script = scripts.run(NEW_TASKS, str(tmp_path / "tasks"))
    assert (script.out.seen, script.err.seen) == ([sent(len(tasks))], [])
    for task in tasks:
        _method, properties, body = channel.basic_get("task_queue", auto_ack=True)
        assert properties is not None
        assert (body, properties.delivery_mode) == (task, 2)
    assert ready(channel) == 0


def test_a_file_without_lines_is_no_error(scripts: Scripts, tmp_path: Path) -> None:
    """And the end of a last line makes no further task."""
    (tmp_path / "tasks").write_bytes(b"")
    assert scripts.run(NEW_TASKS, str(tmp_path / "tasks")).out.seen == [sent(0)]
    (tmp_path / "tasks").write_bytes(b"one\n")
    assert scripts.run(NEW_TASKS, str(tmp_path / "tasks")).out.seen == [sent(1)]


def test_a_task_from_a_pipe_is_sent_when_it_comes(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """The connection outlives a time without any, and the end of the pipe ends the script."""
    heartbeats: list[int] = []

    def watch(index: int, to_broker: bool) -> bool:
        heartbeats.extend([index] * (to_broker and index == 0))
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        pipe = Pipe(tmp_path)
        url = f"{proxy.url}?heartbeat=1"
        script = scripts.start(NEW_TASKS, "--window", "1", pipe.path, amqp_url=url)
        for count in (1, 2, 3):
            pipe.write(b"a task\n")
            eventually(lambda n=count: ready(channel) == n, "the task arrives")  # type: ignore[misc]
        before = len(heartbeats)
        eventually(lambda: len(heartbeats) > before + 4, "two seconds without a task pass")
        pipe.write(b"a task\n")
        pipe.close()
        assert script.wait() == 0
        assert proxy.connections == 1
    assert script.out.seen == [sent(4)]


@pytest.mark.parametrize("window", [1, 10, 100])
def test_the_window_is_never_exceeded(scripts: Scripts, tmp_path: Path, window: int) -> None:
    """As long as no confirm comes, the script sends as many tasks as the window holds, no more."""
    published = 0
    heartbeats = 0  # sent by the script when it had published that many
    may_confirm = threading.Event()

    def watch(index: int, to_broker: bool) -> bool:
        nonlocal published, heartbeats
        published += index == PUBLISH
        heartbeats += to_broker and index == 0 and published >= window
        if index == ACK:
            may_confirm.wait(20)
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        arguments = ("--window", str(window), numbered_lines(tmp_path, 3 * window))
        script = scripts.start(NEW_TASKS, *arguments, amqp_url=f"{proxy.url}?heartbeat=1")
        # The first two are the content of the last task: its frames are no methods, either.
        eventually(lambda: heartbeats > 5, "it waits, and sends heartbeats meanwhile")
        assert published == window
        may_confirm.set()
        assert script.wait() == 0
    assert script.out.seen == [sent(3 * window)]
    assert published == 3 * window


def test_one_confirm_may_be_for_several_tasks(scripts: Scripts, tmp_path: Path) -> None:
    """A confirm with `multiple` is for all tasks up to its own, and for none behind it."""
    published = 0

    def watch(index: int, _to_broker: bool) -> bool:
        nonlocal published
        published += index == PUBLISH
        return index != ACK

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        arguments = ("--window", "10", numbered_lines(tmp_path, 30))
        script = scripts.start(NEW_TASKS, *arguments, amqp_url=proxy.url)
        eventually(lambda: published == 10, "the window is full")
        proxy.say(Basic.Ack(delivery_tag=3))  # not in turn
        eventually(lambda: published == 11, "there is room for one more")
        proxy.say(Basic.Ack(delivery_tag=5, multiple=True))  # 1, 2, 4 and 5
        eventually(lambda: published == 15, "there is room for four more")
        script.process.send_signal(signal.SIGINT)
        assert script.wait() == 130
    assert script.err.seen == [
        " [!] Stopped. 5 tasks are confirmed. The first line that is not confirmed is line 6"
    ]


def test_several_tasks_may_be_rejected_at_once(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """A negative confirm may be for several, too. All these are sent again, a second later."""
    published: list[float] = []

    def watch(index: int, _to_broker: bool) -> bool:
        if index == PUBLISH:
            published.append(time.monotonic())
        return index != ACK

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        script = scripts.start(NEW_TASKS, numbered_lines(tmp_path, 10), amqp_url=proxy.url)
        eventually(lambda: ready(channel) == 10, "all are in the queue")
        proxy.say(Basic.Ack(delivery_tag=2))
        proxy.say(Basic.Nack(delivery_tag=5, multiple=True))  # 1, 3, 4 and 5
        proxy.say(Basic.Ack(delivery_tag=10, multiple=True))
        eventually(lambda: ready(channel) == 14, "they are in the queue again")
        proxy.say(Basic.Ack(delivery_tag=14, multiple=True))
        assert script.wait() == 0
    assert script.err.seen == [REJECTED]
    assert published[10] - published[9] > 0.9
    again = Counter(take_all(channel)) - Counter(numbers(10))
    assert sorted(again) == [b"1", b"3", b"4", b"5"]


def test_a_task_that_comes_back_is_sent_again(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """If the queue is deleted, the script declares it again, and sends those again that come back.

    Here the queue is deleted before it has stored a task. So at last all tasks are in it.
    """
    deleted = False

    def watch(index: int, _to_broker: bool) -> bool:
        nonlocal deleted
        if index == PUBLISH and not deleted:
            channel.queue_delete("task_queue")
            deleted = True
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        arguments = ("--window", "7", numbered_lines(tmp_path, 100))
        script = scripts.run(NEW_TASKS, *arguments, amqp_url=proxy.url)
    assert script.out.seen == [sent(100)]
    assert script.err.seen[0] == " [!] (404, 'The queue is gone'); trying again every second"
    assert set(take_all(channel)) == set(numbers(100))


def test_a_full_queue_gets_the_rest_later(
    broker: Broker, scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """What a full queue rejects is sent again every second, until somebody makes room for it."""
    limit_queue(broker, scripts, 10)
    script = scripts.start(NEW_TASKS, "--window", "20", numbered_lines(tmp_path, 40))
    script.expect_error(REJECTED)
    done = take(channel, 40)
    assert script.wait() == 0
    assert sorted(done) == sorted(numbers(40))  # each once
    assert script.out.seen == [sent(40)]
    assert script.err.seen == [REJECTED]


def test_trouble_that_comes_back_is_reported_again(
    broker: Broker, scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """A queue that stays full is reported once. One that is full again later is reported again."""
    limit_queue(broker, scripts, 1)
    pipe = Pipe(tmp_path)
    script = scripts.start(NEW_TASKS, pipe.path)
    for times in (1, 2):
        pipe.write(b"one\ntwo\n")
        script.expect_error(REJECTED, count=times)
        take(channel, 2)
        time.sleep(13 * (times == 1))  # the script forgets the trouble after ten seconds
    pipe.close()
    assert script.wait() == 0
    assert script.err.seen == [REJECTED] * 2


def test_a_lack_of_confirms_is_reported(scripts: Scripts, tmp_path: Path) -> None:
    """If none comes for ten seconds, the script says so, once. When they come, it goes on."""
    held: list[float] = []  # when confirms came
    may_confirm = threading.Event()

    def watch(index: int, _to_broker: bool) -> bool:
        if index == ACK:
            held.append(time.monotonic())
            may_confirm.wait(60)
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        arguments = ("--window", "10", numbered_lines(tmp_path, 100))
        script = scripts.start(NEW_TASKS, *arguments, amqp_url=proxy.url)
        script.expect_error(NO_CONFIRM, timeout=30)
        assert script.err.time_of(NO_CONFIRM) - held[0] > 8
        time.sleep(2)  # it says nothing more
        may_confirm.set()
        assert script.wait() == 0
    assert script.out.seen == [sent(100)]
    assert script.err.seen == [NO_CONFIRM]


def test_a_lost_connection_loses_no_task(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """Tasks without a confirm are sent again, to the next node that answers; that is counted.

    Neither a node that is down nor a name without an address stops the script.
    """
    confirms = 0

    def watch(index: int, _to_broker: bool) -> bool:
        nonlocal confirms
        confirms += index == ACK
        if confirms == 3:
            proxy.close()
        return confirms < 3

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        urls = ",".join([NODE_WITHOUT_ADDRESS, proxy.url, scripts.amqp_url])
        arguments = ("--window", "10", numbered_lines(tmp_path, 200))
        script = scripts.run(NEW_TASKS, *arguments, amqp_url=urls)
    assert script.out.seen == [sent(200)]
    (told,) = script.err.seen
    count = int(re.fullmatch(r" \[!\] (\d+) tasks were sent again, .* twice", told)[1])  # type: ignore[index]
    tasks = take_all(channel)
    assert set(tasks) == set(numbers(200))
    assert 1 <= len(tasks) - 200 <= count <= 10


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
    script = scripts.start(NEW_TASKS, numbered_lines(tmp_path, count))
    for kill_at in (10_000, 35_000, 60_000):
        channel = connect()
        eventually(lambda: ready(channel) >= kill_at, f"{kill_at} tasks are sent", 60)  # noqa: B023
        own_broker.kill()
        own_broker.start()
    assert script.wait(60) == 0, str(script)
    assert script.out.seen == [sent(count)]
    *lost, told = script.err.seen
    assert len(lost) >= 3
    assert all(LOST.fullmatch(line) for line in lost)
    again = int(re.fullmatch(r" \[!\] (\d+) tasks were sent again, .* twice", told)[1])  # type: ignore[index]
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
    """A broker that is short of memory takes no tasks; the script says so, and reads no more."""
    pipe = Pipe(tmp_path)
    script = scripts.start(NEW_TASKS, "--window", "50", pipe.path)
    pipe.write(b"\n")
    eventually(lambda: ready(channel) == 1, "a task arrives")
    own_broker.rabbitmqctl("set_vm_memory_high_watermark", "0.000001")
    try:
        alarms = "rabbit_alarm:get_alarms()."
        eventually(lambda: "memory" in own_broker.rabbitmqctl("eval", alarms), "it is short of it")
        pipe.write(b"\n")
        script.expect_error(NO_MEMORY)
        taken = pipe.fill(at_least=2 * 50) + 2
        # Two windows, what a pipe holds, and what Python and RabbitMQ read ahead: all of 1 kB
        assert taken < 50 + 50 + 64 + 300
    finally:
        own_broker.rabbitmqctl("set_vm_memory_high_watermark", "0.6")
    pipe.close()
    assert script.wait() == 0
    assert script.out.seen == [sent(taken)]
    assert ready(channel) == taken


def peak_memory(scripts: Scripts, channel: BlockingChannel, folder: Path, count: int) -> int:
    """Send so many tasks through a pipe, and return the script's peak of memory, in kB."""
    folder.mkdir()
    pipe = Pipe(folder)
    script = scripts.start(NEW_TASKS, "--window", "100", pipe.path)
    for _ in range(count // 500):
        pipe.write((b"x" * 199 + b"\n") * 500)
    eventually(lambda: ready(channel) == count, "all tasks arrive")
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
    """Twenty times as many lines, of 10 MB together, need no more memory."""
    channel.queue_declare("task_queue", durable=True)
    few = peak_memory(scripts, channel, tmp_path / "few", 2_500)
    many = peak_memory(scripts, channel, tmp_path / "many", 50_000)
    record_property("memory for 2,500 and for 50,000 tasks", f"{few} kB, {many} kB")
    assert many < few + 4_000


def on_a_terminal(scripts: Scripts, *arguments: str) -> str:
    """Run the script on a terminal to its end, and return what this shows."""
    command = [str(ROOT / NEW_TASKS), *arguments]
    env = environment(scripts.amqp_url)
    terminal = pexpect.spawn(sys.executable, command, env=env, encoding="utf-8", timeout=20)
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    return str(terminal.before)


def test_progress_is_shown_on_a_terminal_alone(scripts: Scripts, tmp_path: Path) -> None:
    """One line, which is written anew: how many are confirmed, and how many a second."""
    path = numbered_lines(tmp_path, 20_000)
    shown = on_a_terminal(scripts, path)
    progress = re.findall(r" \[\.\] (\d+) confirmed, \d+ per second \r", shown)
    assert len(progress) >= 3
    assert progress == sorted(progress, key=int)
    assert progress[-1] == "20000"
    assert shown.count("\n") == 2
    assert shown.endswith(f"per second \r\r\n{sent(20_000)}\r\n")
    script = scripts.run(NEW_TASKS, path)
    assert (script.out.seen, script.err.seen) == ([sent(20_000)], [])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name)
def test_after_ctrl_c_one_knows_where_to_go_on(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path, how: signal.Signals
) -> None:
    """All lines before the one that it names are in the queue. The script goes on from there."""
    script = scripts.start(NEW_TASKS, path := numbered_lines(tmp_path, 200_000))
    channel.queue_declare("task_queue", durable=True)
    eventually(lambda: ready(channel) > 3000, "it sends")
    assert script.stop(how) < 1
    assert script.process.returncode == 128 + how
    assert script.out.seen == []
    (told,) = script.err.seen
    stopped = re.fullmatch(
        r" \[!\] Stopped\. (\d+) tasks are confirmed\. "
        r"The first line that is not confirmed is line (\d+)",
        told,
    )
    assert stopped, told
    confirmed, first = int(stopped[1]), int(stopped[2])
    assert 2000 < first - 1 <= confirmed
    tasks = set(take_all(channel))
    assert set(numbers(first - 1)) <= tasks
    assert confirmed <= len(tasks) <= confirmed + 1000

    rest = tmp_path / "rest"
    with open(path, "rb") as source:
        rest.write_bytes(b"".join(source.readlines()[first - 1 : first + 2000]))
    scripts.run(NEW_TASKS, str(rest))
    assert set(numbers(first + 2000)) <= tasks | set(take_all(channel))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name)
def test_nothing_keeps_it_from_ending(
    scripts: Scripts, tmp_path: Path, how: signal.Signals
) -> None:
    """Neither a broker that hangs nor output that is stuck, nor a second signal soon after."""
    pipe = Pipe(tmp_path)
    with full_pipe() as stuck, closing(Proxy(scripts.amqp_url, lambda *_: False)) as silent:
        process = subprocess.Popen(
            [sys.executable, ROOT / NEW_TASKS, pipe.path],
            env=environment(silent.url),
            stdout=stuck,
            stderr=stuck,
        )
        eventually(lambda: silent.connections == 1, "it connects")
        begin = time.monotonic()
        process.send_signal(how)
        process.send_signal(how)
        assert process.wait(20) == 128 + how
        assert time.monotonic() - begin < 1
    pipe.close()


@pytest.mark.speed
def test_it_is_twenty_times_as_fast_as_one_confirm_at_a_time(
    scripts: Scripts,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """With the default window of 1000, beside a window of 1. They take turns, and it is the best of
    five: whatever else runs on the machine makes the larger window slower, and not the other."""

    def rate(tasks: int, *options: str) -> float:
        path = numbered_lines(tmp_path, tasks)
        return float(re.findall(r"(\d+) per second \r", on_a_terminal(scripts, path, *options))[-1])

    rounds = [(rate(1000, "--window=1"), rate(40_000)) for _ in range(5)]
    slow, fast = max(rounds, key=lambda rates: rates[1] / rates[0])
    record_property(
        "publishing with a window of 1 and of 1000",
        f"{slow:.0f} and {fast:.0f} tasks/s: {fast / slow:.0f} times",
    )
    assert fast / slow >= 20


def test_what_rabbitmq_refuses_is_one_line(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """No broker, a wrong password, no such virtual host, other settings of the queue."""
    path = numbered_lines(tmp_path, 3)

    def refused(url: str) -> str:
        return one_line(scripts.start(NEW_TASKS, path, amqp_url=url))

    nobody = replaced(scripts.amqp_url, user=f"guest:{SECRET}", port=free_port())
    assert "ConnectionRefusedError" in refused(nobody)
    assert "ACCESS_REFUSED" in refused(replaced(scripts.amqp_url, user=f"guest:{SECRET}"))
    assert "NOT_ALLOWED" in refused(replaced(scripts.amqp_url, path="/nowhere"))
    assert "must look like" in refused(SECRET)
    assert "gaierror" in refused(NODE_WITHOUT_ADDRESS)
    channel.queue_declare("task_queue", durable=True, arguments={"x-max-length": 5})
    assert "PRECONDITION_FAILED" in refused(scripts.amqp_url)


def test_a_task_that_is_too_large_is_one_line(
    broker: Broker, scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """RabbitMQ refuses it. The line says where to go on."""
    size = 129 if broker.version.startswith("3") else 17
    (tmp_path / "tasks").write_bytes(b"small\n" + b"x" * size * 2**20 + b"\nsmall")
    line = one_line(scripts.start(NEW_TASKS, "--window", "1", str(tmp_path / "tasks")))
    assert "PRECONDITION_FAILED - message size" in line
    assert line.endswith("). 1 tasks are confirmed. The first line that is not confirmed is line 2")
    assert ready(channel) == 1


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
FIRST_UNREAD = "2 tasks are confirmed. The first line that is not confirmed is line 3"


def two_lines_and_an_error() -> IO[bytes]:
    """Return a file for which this is what comes when it is read."""
    descriptor, terminal = os.openpty()
    tty.setraw(terminal)
    os.write(terminal, b"one\ntwo\n")
    os.close(terminal)
    return open(descriptor, "rb", buffering=0)


@needs_linux
def test_input_that_cannot_be_read_on_is_one_line(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """All lines before are sent and confirmed first. The line says where to go on."""
    with two_lines_and_an_error() as lines:
        ended = subprocess.run(
            [sys.executable, ROOT / NEW_TASKS],
            env=environment(scripts.amqp_url),
            stdin=lines,
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert (ended.returncode, ended.stdout) == (1, "")
    error = "OSError(5, 'Input/output error')"
    assert ended.stderr == f" [!] A line cannot be read: {error}. {FIRST_UNREAD}\n"
    assert take_all(channel) == [b"one", b"two"]


@needs_linux
def test_a_line_that_is_larger_than_the_memory_is_one_line(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """The lines before are sent and confirmed."""
    os.mkfifo(path := tmp_path / "pipe")
    script = scripts.start(NEW_TASKS, str(path))
    process_id = script.process.pid
    with contextlib.suppress(BrokenPipeError), open(path, "wb", buffering=0) as lines:
        lines.write(b"one\ntwo\n")
        eventually(lambda: ready(channel) == 2, "both tasks arrive")
        pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**26
        resource.prlimit(process_id, resource.RLIMIT_AS, (limit, limit))
        while True:
            lines.write(bytes(2**20))
    assert one_line(script) == f" [!] A line cannot be read: MemoryError(). {FIRST_UNREAD}"


@needs_linux
def test_output_that_nobody_can_read_keeps_it_from_nothing(scripts: Scripts) -> None:
    """If both outputs are closed pipes, the script can report nothing. It ends all the same."""
    read, broken = os.pipe()
    os.close(read)
    with two_lines_and_an_error() as lines, open(broken, "wb") as output:
        for stdin in (lines, subprocess.DEVNULL):
            ended = subprocess.run(
                [sys.executable, ROOT / NEW_TASKS],
                env=environment(scripts.amqp_url),
                stdin=stdin,
                stdout=output,
                stderr=output,
                timeout=20,
            )
            assert ended.returncode == 1


def test_what_it_does_not_know_is_refused(scripts: Scripts, tmp_path: Path) -> None:
    """A window that is none is a usage error; a file that is not there is one line."""
    for window in ("0", "-1", "many"):
        refused = scripts.run(NEW_TASKS, f"--window={window}", status=2)
        assert refused.err.seen[0].startswith("usage: new_tasks.py ")
    assert "No such file" in one_line(scripts.start(NEW_TASKS, str(tmp_path / "nothing")))
    assert "Is a directory" in one_line(scripts.start(NEW_TASKS, str(tmp_path)))
