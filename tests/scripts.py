"""Scripts as a reader runs them: separate processes, whose output is read as it comes."""

from __future__ import annotations

import io
import os
import queue
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import BasicProperties

from tools import ROOT, TIMEOUT, environment
from tools.broker import Broker, eventually, virtual_host_of

SEND, RECEIVE = "hello_world/send.py", "hello_world/receive.py"
NEW_TASK, WORKER = "work_queues/new_task.py", "work_queues/worker.py"
EMIT_LOG, RECEIVE_LOGS = "publish_subscribe/emit_log.py", "publish_subscribe/receive_logs.py"
EMIT_DIRECT, RECEIVE_DIRECT = "routing/emit_log_direct.py", "routing/receive_logs_direct.py"
EMIT_TOPIC, RECEIVE_TOPIC = "topics/emit_log_topic.py", "topics/receive_logs_topic.py"
RPC_CLIENT, RPC_SERVER = "rpc/rpc_client.py", "rpc/rpc_server.py"
NEW_TASKS = "publisher_confirms/new_tasks.py"
NEW_FILE, FILE_WORKER = "dead_letters/new_task.py", "dead_letters/worker.py"
PARKED = "dead_letters/parked.py"

LOGS_WAITING = " [*] Waiting for logs. To exit press CTRL+C"
TASKS_WAITING = " [*] Waiting for tasks. To exit press CTRL+C"
CONSUMERS = {  # and what each of them prints when it consumes
    RECEIVE: " [*] Waiting for messages. To exit press CTRL+C",
    WORKER: TASKS_WAITING,
    RECEIVE_LOGS: LOGS_WAITING,
    RECEIVE_DIRECT: LOGS_WAITING,
    RECEIVE_TOPIC: LOGS_WAITING,
    RPC_SERVER: " [x] Awaiting RPC requests",
    FILE_WORKER: TASKS_WAITING,
}
PRODUCERS = [SEND, NEW_TASK, EMIT_LOG, EMIT_DIRECT, EMIT_TOPIC, RPC_CLIENT, NEW_FILE, PARKED]
SCRIPTS = [*CONSUMERS, *PRODUCERS, NEW_TASKS]  # the last one has plumbing of its own
# One of each shape. What all have to the letter need not be tried on all.
SHAPES = [RECEIVE, RECEIVE_LOGS, WORKER, RPC_SERVER, SEND, RPC_CLIENT]
NEEDED = {RECEIVE_DIRECT: ["info"], RECEIVE_TOPIC: ["#"], NEW_FILE: ["README.md"]}  # arguments
SECRET = "s3cr3t-pässword"
DONE = " [x] Done"  # a worker of lesson 2 or 8
RECEIVED = re.compile(r" \[x\] Received '(.*?)'( \(redelivered\))?")
PATIENCE = 30  # seconds without a single line, after which something has been lost or hangs
NO_BROKER = " [!] No RabbitMQ accepts us: "
MALFORMED = " [!] AMQP_URL must look like amqp://user:password@host:5672/virtual_host"
LOST = re.compile(r" \[!\] .+; trying again every second")
each_signal = pytest.mark.parametrize(
    "how", [signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name
)


class Lines:
    """The lines of a stream, read by a thread as they come."""

    def __init__(self, stream: IO[bytes], echo: Callable[[str], object]) -> None:
        self.seen: list[str] = []
        self.times: list[float] = []  # when each of them came, on the monotonic clock
        self._echo = echo
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                text = line.decode(errors="backslashreplace").removesuffix("\n")
                with self._change:
                    self.seen.append(text)
                    self.times.append(time.monotonic())
                    self._change.notify_all()
                self._echo(text)
        with self._change:
            self._closed = True
            self._change.notify_all()

    def wait_for(self, enough: Callable[[list[str]], bool], timeout: float) -> bool:
        """Wait until the lines are enough; False if the stream or the time ends before."""
        with self._change:
            self._change.wait_for(lambda: enough(self.seen) or self._closed, timeout)
            return enough(self.seen)

    def time_of(self, line: str) -> float:
        """Return when a line that was seen came, on the monotonic clock."""
        return self.times[self.seen.index(line)]

    def all(self) -> list[str]:
        """Return all lines of a stream that has ended."""
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive(), "a stream is still open"
        return self.seen


class Script:
    """A running script. Its two streams are `out` and `err`."""

    def __init__(
        self,
        command: Sequence[str | bytes | Path],
        env: dict[str, str],
        cwd: Path = ROOT,
        echo: Callable[[str], object] = lambda _line: None,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] = subprocess.PIPE,
    ) -> None:
        """Start a command. Its standard output comes in `out`, unless it is to go elsewhere."""
        words = [os.fsdecode(word) for word in command]
        self.name = " ".join(words)[:200]
        self.path = Path(next((word for word in words if word.endswith(".py")), ""))
        self.process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stderr
        self.out = Lines(self.process.stdout or io.BytesIO(), echo)
        self.err = Lines(self.process.stderr, echo)
        self.expect = partial(self._expect, self.out)
        self.expect_error = partial(self._expect, self.err)

    def __str__(self) -> str:
        return f"{self.name}\n  printed: {self.out.seen[-20:]}\n  complained: {self.err.seen[-20:]}"

    def _expect(
        self, stream: Lines, line: str | re.Pattern[str], count: int = 1, timeout: float = TIMEOUT
    ) -> None:
        """Wait until `line` has come in this stream, as a whole line, at least `count` times."""
        is_it = line.__eq__ if isinstance(line, str) else line.fullmatch

        def enough(lines: list[str]) -> bool:
            return sum(1 for seen in lines if is_it(seen)) >= count

        assert stream.wait_for(enough, timeout), f"{str(line)[:500]} did not come from {self}"

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait until the script ends, and return its exit status; -9 if it was killed."""
        status = self.process.wait(timeout)
        self.out.all()
        self.err.all()
        return status

    def stop(self, how: signal.Signals = signal.SIGINT) -> float:
        """Send a signal, wait until the script ends, and return how many seconds that took."""
        begin = time.monotonic()
        self.process.send_signal(how)
        self.wait()
        return time.monotonic() - begin

    def kill(self) -> None:
        """Kill the script with SIGKILL, and what it has started, if it still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()


class Scripts:
    """Starts scripts against one virtual host, and kills those that still run at the end."""

    def __init__(self, amqp_url: str) -> None:
        self.amqp_url = amqp_url
        self.started: list[Script] = []
        self._settings: dict[str, str] = {}

    @contextmanager
    def environment(self, **settings: str) -> Iterator[None]:
        """Set variables in the environment of the scripts that are started meanwhile."""
        self._settings = settings
        try:
            yield
        finally:
            self._settings = {}

    def start(
        self,
        script: str | Path,
        *arguments: str | bytes,
        amqp_url: str | None = None,
        stdout: int | IO[bytes] = subprocess.PIPE,
    ) -> Script:
        """Start a script, by its path in the repository, and return it while it runs."""
        command = [sys.executable, ROOT / script, *arguments]
        env = environment(self.amqp_url if amqp_url is None else amqp_url, **self._settings)
        return self.start_command(command, env, stdout=stdout)

    def start_command(
        self, command: Sequence[str | bytes | Path], env: dict[str, str], **settings: Any
    ) -> Script:
        """Start any command, which is killed at the end, too, if it still runs."""
        self.started.append(Script(command, env, **settings))
        return self.started[-1]

    def launch(self, *names: str, **settings: Any) -> dict[str, Script]:
        """Start scripts side by side, each with the arguments that it cannot do without."""
        return {name: self.start(name, *NEEDED.get(name, []), **settings) for name in names}

    def run(
        self, script: str, *arguments: str | bytes, amqp_url: str | None = None, status: int = 0
    ) -> Script:
        """Run a script to its end, which must be with this exit status."""
        ended = self.start(script, *arguments, amqp_url=amqp_url)
        assert ended.wait() == status, str(ended)
        return ended

    def close(self) -> None:
        """Kill the scripts that still run."""
        for script in self.started:
            script.kill()


class Crew:
    """Scripts of one kind. Whoever is killed is replaced; the lines of all come in one queue."""

    def __init__(self, scripts: Scripts, size: int, *command: str) -> None:
        self.scripts = scripts
        self.command = command
        self.lines: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self.everyone: list[Script] = []  # those killed, too
        self.killed = 0
        self.members = [self.start() for _ in range(size)]

    def start(self, *more: str) -> Script:
        """Start one more, whose lines come with its number, counted from 1."""
        number = len(self.everyone) + 1
        command = [sys.executable, *self.command, *more]
        env = environment(self.scripts.amqp_url)
        script = self.scripts.start_command(
            command, env, echo=lambda line: self.lines.put((number, line))
        )
        self.everyone.append(script)
        return script

    def kill_one(self, rng: random.Random) -> None:
        """Kill one that serves, or else one that is just starting, and start another."""
        serving = [member for member in self.members if member.out.seen]
        victim = rng.choice(serving or self.members)
        victim.kill()
        self.members[self.members.index(victim)] = self.start()
        self.killed += 1

    def complaints(self) -> list[str]:
        """Return what was printed on standard error, but for that RabbitMQ is away."""
        return [
            line for script in self.everyone for line in script.err.seen if not LOST.fullmatch(line)
        ]

    def read(self) -> Iterator[tuple[int, str]]:
        """Give number and line for each line printed, until none comes for a long time."""
        with suppress(queue.Empty):
            while True:
                yield self.lines.get(timeout=PATIENCE)


def stream_of(script: Script) -> tuple[Lines, str]:
    """Return the stream in which a consumer says that it waits, and the line that says so."""
    line = next(line for path, line in CONSUMERS.items() if Path(path).name == script.path.name)
    return (script.err if line == LOGS_WAITING else script.out), line


def expect_waiting(script: Script, count: int = 1) -> None:
    """Wait until a consumer has said so often that it waits."""
    stream, line = stream_of(script)
    expect = script.expect if stream is script.out else script.expect_error
    expect(line, count=count, timeout=30)


def consumer(
    scripts: Scripts, name: str, *arguments: str | bytes, amqp_url: str | None = None
) -> Script:
    """Start a consumer and wait until it consumes."""
    started = scripts.start(name, *(arguments or NEEDED.get(name, [])), amqp_url=amqp_url)
    expect_waiting(started)
    return started


def received(text: str, redelivered: bool = False) -> str:
    """Return what a receiver or a worker prints when it gets this text."""
    return f" [x] Received {text!r}" + " (redelivered)" * redelivered


def take(channel: BlockingChannel, queue: str) -> tuple[BasicProperties, bytes]:
    """Wait for a message in a queue, take it out, and return its properties and its body."""
    eventually(lambda: size(channel, queue), f"a message comes in {queue}")
    message: Any = channel.basic_get(queue, auto_ack=True)
    return message[1], message[2]


def one_line(script: Script) -> str:
    """Return the one line on standard error of a script that failed, printing nothing else."""
    assert script.wait() == 1, str(script)
    (line,) = script.err.seen
    assert line.startswith(" [!] ")
    assert SECRET not in line
    assert "guest:guest" not in line
    return line


def replaced(url: str, user: str = "guest:guest", port: int | None = None, path: str = "") -> str:
    """Return an AMQP URL with another user and password, port or virtual host."""
    parts = urlsplit(url)
    place = f"{parts.hostname}:{port or parts.port}"
    return parts._replace(netloc=f"{user}@{place}", path=path or parts.path).geturl()


@contextmanager
def another_user(broker: Broker, amqp_url: str, name: str, **permissions: str) -> Iterator[str]:
    """Make a user, yield its URL for the virtual host of `amqp_url`, and delete it.

    It may `configure`, `write` and `read` what these patterns fit, and nothing without one.
    """
    allowed = {"configure": "", "write": "", "read": ""} | permissions
    broker.api("PUT", f"users/{name}", {"password": SECRET, "tags": ""})
    try:
        broker.api("PUT", f"permissions/{virtual_host_of(amqp_url)}/{name}", allowed)
        yield replaced(amqp_url, user=f"{name}:{quote(SECRET)}")
    finally:
        broker.api("DELETE", f"users/{name}")


@contextmanager
def consumer_timeout(broker: Broker, milliseconds: int) -> Iterator[None]:
    """Let RabbitMQ wait so long for an acknowledgement, instead of half an hour."""

    def set_times(timeout: int, tick: int) -> None:
        settings = {"consumer_timeout": timeout, "channel_tick_interval": tick}.items()
        calls = (f"application:set_env(rabbit, {name}, {value})" for name, value in settings)
        broker.rabbitmqctl("eval", f"{', '.join(calls)}.")

    set_times(milliseconds, milliseconds // 2)
    try:
        yield
    finally:
        set_times(1_800_000, 60_000)


@contextmanager
def full_pipe() -> Iterator[int]:
    """Give the end for writing of a pipe that is full, and that nobody reads."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 512)
    except BlockingIOError:
        os.set_blocking(write, True)
    try:
        yield write
    finally:
        os.close(read)
        os.close(write)


# --- Tasks and their workers, of lessons 2 and 8 ---


def worker_that(script: str, work: str, folder: Path) -> str:
    """Write a copy of a worker that does other work with `text`, and return its path."""
    source = (ROOT / script).read_text(encoding="utf-8")
    body = r'(?<=\ndef work\(text\):\n)    """.*"""\n(?:    .*\n)+'
    assert len(re.findall(body, source)) == 1
    path = folder / Path(script).name
    path.write_text(re.sub(body, lambda _: f"    {work}\n", source), encoding="utf-8")
    return str(path)


def put(channel: BlockingChannel, queue: str, *tasks: str, **properties: object) -> None:
    """Put tasks into a queue that exists, as a producer does, and faster."""
    channel.confirm_delivery()
    for task in tasks:
        its = BasicProperties(**{"delivery_mode": 2} | properties)
        channel.basic_publish("", queue, os.fsencode(task), its, mandatory=True)


def limit_queue(broker: Broker, amqp_url: str, queue: str, length: int) -> None:
    """Let a queue reject tasks as soon as it has so many."""
    full = {"max-length": length, "overflow": "reject-publish"}
    policy = {"pattern": f"^{queue}$", "definition": full, "apply-to": "queues"}
    broker.api("PUT", f"policies/{virtual_host_of(amqp_url)}/full", policy)


def size(channel: BlockingChannel, queue: str) -> int:
    """Return how many messages are ready in a queue, as the broker counts them."""
    return int(channel.queue_declare(queue, passive=True).method.message_count)


def parked(channel: BlockingChannel) -> list[tuple[bytes, BasicProperties]]:
    """Take all tasks out of the queue of parked tasks."""
    taken = [take(channel, "tasks.parked") for _ in range(size(channel, "tasks.parked"))]
    return [(body, its) for its, body in taken]


def failures_of(properties: BasicProperties) -> list[str]:
    """Return why the tries of a parked task failed."""
    return list((properties.headers or {}).get("failures", []))


def ready(channel: BlockingChannel) -> int:
    """Return how many tasks are in lesson 2's queue, as the broker counts them."""
    return int(channel.queue_declare("task_queue", durable=True).method.message_count)


def tasks_of(script: Script) -> list[str]:
    """Return the tasks that a worker has received, in order."""
    return [found[1] for line in script.out.seen if (found := RECEIVED.fullmatch(line))]


class LargeNumber(BasicProperties):
    """Properties with a header that other clients can send: pika reads it, but cannot write it."""

    def __init__(self) -> None:
        super().__init__(headers={"size": 2**62})  # type: ignore[no-untyped-call]

    def encode(self) -> list[bytes]:
        """Return the bytes: pika writes an integer, and this makes it a float, 1e300."""
        pieces: list[bytes] = super().encode()  # type: ignore[no-untyped-call]
        integer, number = struct.pack(">q", 2**62), struct.pack(">d", 1e300)
        return [b"".join(pieces).replace(b"\x04sizel" + integer, b"\x04sized" + number)]


def enoent(task: str) -> str:
    """Return why a task of lesson 8 fails whose file is missing."""
    return f"FileNotFoundError: [Errno 2] No such file or directory: {task!r}"


def listing(scripts: Scripts, *options: str) -> list[str]:
    """Return what parked.py prints, with T for every time."""
    lines = scripts.run(PARKED, *options).out.all()
    return [re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+00:00", "T", line) for line in lines]


def fibonacci(n: int) -> int:
    """Return the number without the recursion of rpc_server.py. Exact up to 70."""
    return round(((1 + 5**0.5) / 2) ** n / 5**0.5)


# --- What the tests of lessons 10 to 14 share ---

Record = Callable[[str, object], None]  # what the fixture record_property is


def usage_error(script: Script) -> str:
    """Return the last line of a script that has refused its arguments, and done nothing else."""
    assert script.wait() == 2, str(script)
    assert script.out.seen == []
    assert script.err.seen[0].startswith(f"usage: {script.path.name} ")
    return script.err.seen[-1]
