"""What new_tasks.py reads, what it tells meanwhile, and how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import tty
from contextlib import closing
from pathlib import Path
from typing import IO

import pexpect
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from tests.confirms import Pipe, numbers, send, sent, take_all
from tests.proxy import Proxy
from tests.scripts import NEW_TASKS, Scripts, each_signal, full_pipe, one_line, ready
from tools import ROOT, TIMEOUT, environment
from tools.broker import Broker, eventually

COMMAND = [sys.executable, str(ROOT / NEW_TASKS)]
FIRST_UNREAD = "2 tasks are confirmed. Go on from line 3"
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


# --- Input ---


def test_each_line_is_a_task(scripts: Scripts, channel: BlockingChannel, tmp_path: Path) -> None:
    """In the order of the file, as bytes, and persistent. The end of a line, of Unix or of Windows,
    is no part of the task, and the end of the last line makes no further task."""
    long = b"x" * 300_000
    tasks = [b"first", b"", b"  spaces ", "错误".encode(), b"\xff\xfe\x00\r", long, b"last"]
    for end in (b"\n", b"\r\n", b""):
        text = end.join([*tasks, b""]) if end else b""
        (tmp_path / "tasks").write_bytes(text)
        script = scripts.run(NEW_TASKS, str(tmp_path / "tasks"))
        expected = [(task + end).removesuffix(b"\n").removesuffix(b"\r") for task in tasks if end]
        assert (script.out.seen, script.err.seen) == ([sent(len(expected))], [])
        for task in expected:
            _method, properties, body = channel.basic_get("task_queue", auto_ack=True)
            assert properties is not None
            assert (body, properties.delivery_mode) == (task, 2)
        assert ready(channel) == 0


def test_a_task_from_a_pipe_is_sent_when_it_comes(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """The connection outlives a time without any, and the end of the pipe ends the script."""
    with closing(Proxy(scripts.amqp_url)) as proxy:
        pipe = Pipe(tmp_path)
        url = f"{proxy.url}?heartbeat=1"
        script = scripts.start(NEW_TASKS, "--window", "1", pipe.path, amqp_url=url)
        for tasks in (1, 2, 3):
            pipe.write(b"a task\n")
            eventually(lambda n=tasks: ready(channel) == n, "the task arrives")  # type: ignore[misc]
        proxy.wait_for_heartbeats()  # two seconds without a task pass
        pipe.write(b"a task\n")
        pipe.close()
        assert script.wait() == 0
        assert proxy.connections == 1
    assert script.out.seen == [sent(4)]


def test_nothing_yet_is_not_the_end(scripts: Scripts, channel: BlockingChannel) -> None:
    """Another program may have told the input not to wait. The script waits all the same, and half
    a line is no task."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    script = scripts.start_command(COMMAND, environment(scripts.amqp_url), stdin=reading)
    os.close(reading)
    for half, tasks in ((b"one\ntw", 1), (b"o\nthr", 2), (b"ee", 2)):
        os.write(writing, half)
        eventually(lambda n=tasks: ready(channel) == n, "a line arrives")  # type: ignore[misc]
    os.close(writing)
    assert script.wait() == 0
    assert script.out.seen == [sent(3)]
    assert take_all(channel) == [b"one", b"two", b"three"]


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
        script = scripts.start_command(COMMAND, environment(scripts.amqp_url), stdin=lines)
    error = "OSError(5, 'Input/output error')"
    assert one_line(script) == f" [!] A line cannot be read: {error}. {FIRST_UNREAD}"
    assert script.out.seen == []
    assert take_all(channel) == [b"one", b"two"]


def test_a_line_that_has_no_end_is_one_line(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """A line that no RabbitMQ accepts is not read to its end. Those before are confirmed."""
    os.mkfifo(path := tmp_path / "pipe")
    script = scripts.start(NEW_TASKS, str(path))
    with contextlib.suppress(BrokenPipeError), open(path, "wb", buffering=0) as lines:
        lines.write(b"one\ntwo\n")
        for _ in range(1024):
            lines.write(bytes(2**20))
        pytest.fail("a gigabyte was read")
    error = "ValueError('it has 128 MiB or more')"
    assert one_line(script) == f" [!] A line cannot be read: {error}. {FIRST_UNREAD}"
    assert take_all(channel) == [b"one", b"two"]


def test_a_task_that_is_too_large_is_one_line(
    broker: Broker, scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """RabbitMQ 4 refuses more than 16 MiB. The line says where to go on."""
    if broker.version.startswith("3"):
        pytest.skip("RabbitMQ 3 accepts every line that the script reads: up to 128 MiB")
    (tmp_path / "tasks").write_bytes(b"small\n" + b"x" * 17 * 2**20 + b"\nsmall")
    line = one_line(scripts.start(NEW_TASKS, "--window", "1", str(tmp_path / "tasks")))
    assert "PRECONDITION_FAILED - message size" in line
    assert line.endswith("). 1 tasks are confirmed. Go on from line 2")
    assert ready(channel) == 1


def test_a_file_that_is_not_there_is_one_line(scripts: Scripts, tmp_path: Path) -> None:
    """So is a folder."""
    assert "No such file" in one_line(scripts.start(NEW_TASKS, str(tmp_path / "nothing")))
    assert "Is a directory" in one_line(scripts.start(NEW_TASKS, str(tmp_path)))


# --- What it tells, and how it ends ---


def test_progress_is_shown_on_a_terminal_alone(amqp_url: str, tmp_path: Path) -> None:
    """One line, which is written anew: how many are confirmed, and how many a second. (The other
    tests, where standard error is a pipe, see none.)"""
    pipe = Pipe(tmp_path)
    command = f"{' '.join(COMMAND)} {pipe.path}"
    terminal = pexpect.spawn(command, env=environment(amqp_url), encoding="utf-8")
    for tasks in (2, 4):
        pipe.write(b"a task\n" * 2)
        terminal.expect_exact(f" [.] {tasks} confirmed, ", timeout=TIMEOUT)
    pipe.close()
    terminal.expect(pexpect.EOF, timeout=TIMEOUT)
    last = rf"(\d per second \r( \[\.\] 4 confirmed, )?)+\r?\n{re.escape(sent(4))}\r\n"
    assert re.fullmatch(last, str(terminal.before))


@each_signal
def test_after_ctrl_c_one_knows_where_to_go_on(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path, how: signal.Signals
) -> None:
    """All lines before the one that it names are in the queue. The script goes on from there."""
    channel.queue_declare("task_queue", durable=True)
    script = send(scripts, tmp_path, 200_000)
    eventually(lambda: ready(channel) > 3000, "it sends")
    assert script.stop(how) < 2  # a second, or a little more if this machine is busy
    assert script.process.returncode == -how
    assert script.out.seen == []
    (told,) = script.err.seen
    stopped = re.fullmatch(
        r" \[!\] Stopped\. (\d+) tasks are confirmed\. Go on from line (\d+)", told
    )
    assert stopped, told
    confirmed, first = int(stopped[1]), int(stopped[2])
    assert 2000 < first - 1 <= confirmed
    tasks = set(take_all(channel))
    assert set(numbers(first - 1)) <= tasks
    assert confirmed <= len(tasks) <= confirmed + 1000

    rest = tmp_path / "rest"
    rest.write_bytes(b"\n".join(numbers(first + 2000)[first - 1 :]))
    scripts.run(NEW_TASKS, str(rest))
    assert set(numbers(first + 2000)) <= tasks | set(take_all(channel))


@each_signal
def test_nothing_keeps_it_from_ending(
    scripts: Scripts, tmp_path: Path, how: signal.Signals
) -> None:
    """Neither a broker that hangs nor output that is stuck, nor a second signal soon after."""
    pipe = Pipe(tmp_path)
    with full_pipe() as stuck, closing(Proxy(scripts.amqp_url, lambda *_: False)) as silent:
        process = subprocess.Popen(
            [*COMMAND, pipe.path], env=environment(silent.url), stdout=stuck, stderr=stuck
        )
        eventually(lambda: silent.connections == 1, "it connects")
        begin = time.monotonic()
        process.send_signal(how)
        process.send_signal(how)
        assert process.wait(TIMEOUT) == -how
        assert time.monotonic() - begin < 2  # as above
    pipe.close()


@needs_linux
def test_output_that_nobody_can_read_keeps_it_from_nothing(amqp_url: str) -> None:
    """If both outputs are closed pipes, the script can report nothing. It ends all the same."""
    read, broken = os.pipe()
    os.close(read)
    with two_lines_and_an_error() as lines, open(broken, "wb") as output:
        for stdin in (lines, subprocess.DEVNULL):
            ended = subprocess.run(
                COMMAND,
                env=environment(amqp_url),
                stdin=stdin,
                stdout=output,
                stderr=output,
                timeout=TIMEOUT,
            )
            assert ended.returncode == 1
