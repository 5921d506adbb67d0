"""What is measured, and with what: tables of ways, and scripts whose lines are counted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType

import pika

from tools import ROOT, environment
from tools.broker import Broker, eventually, virtual_host_of

PATIENCE = 120  # seconds for one run; it takes about one
POLL = 0.001  # seconds between two looks at a file or a queue


@dataclass
class Table:
    """Several ways to do the same. Each of them is run several times."""

    name: str  # of its chart
    title: str
    about: str
    unit: str
    ways: dict[str, Callable[[], float]]  # each makes one run and returns its figure
    group: int = 100  # after so many ways, another group begins
    runs: int | None = None  # if not as many as usual
    figures: dict[str, list[float]] = field(default_factory=dict)

    def take(self) -> Iterator[str]:
        """Run all ways in turn, again and again; yield the name of each one that has been run."""
        for way, run in self.ways.items():
            self.figures.setdefault(way, []).append(run())
            yield way

    def ratio(self, way: str) -> float:
        """Return how many times the figure of its group's first way this one's is.

        It is the median of the ratios within one turn: what slows a turn down slows both.
        """
        names = list(self.ways)
        i = names.index(way)
        first = self.figures[names[i - i % self.group]]
        return median(x / y for x, y in zip(self.figures[way], first, strict=True))


class Counted:
    """A running Python script. Its output goes to a file, so that no reader slows it down."""

    def __init__(self, amqp_url: str, *command: str, line: str, feed: bool = False) -> None:
        """Start it. `line` is the beginning of those lines that are counted."""
        self.name = " ".join(command)
        self._line = line.encode()
        self._counted = 0
        self._read = 0  # up to where in the file
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(amqp_url),
            stdin=subprocess.PIPE if feed else subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Counted:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with the processes that it has started
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()
        self._output.close()

    def count(self) -> int:
        """Return how many of the lines have come."""
        data = os.pread(self._output.fileno(), 2**24, self._read)
        lines = data[: data.rfind(b"\n") + 1]  # the rest will come
        self._read += len(lines)
        self._counted += (b"\n" + lines).count(b"\n" + self._line)
        return self._counted

    def wait_for(self, count: int) -> tuple[float, int]:
        """Wait until at least so many lines have come. Return when that was, and how many came."""
        deadline = time.monotonic() + PATIENCE
        while self.count() < count:
            if self.process.poll() is not None or time.monotonic() > deadline:
                if self.count() >= count:  # its last lines came while we looked
                    break
                last = os.pread(self._output.fileno(), 500, max(self._read - 500, 0))
                raise RuntimeError(
                    f"{self.name} printed too little: {last.decode(errors='replace')}"
                )
            time.sleep(POLL)
        return time.perf_counter(), self._counted

    def feed(self, lines: bytes) -> None:
        """Write lines to its standard input."""
        assert self.process.stdin
        self.process.stdin.write(lines)
        self.process.stdin.flush()

    def end_of_lines(self) -> None:
        """Close its standard input."""
        assert self.process.stdin
        self.process.stdin.close()

    def peak_memory(self) -> float:
        """Return the most memory that it has used, in MB."""
        with open(f"/proc/{self.process.pid}/status") as status:
            peak = next(line for line in status if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024


class Queue:
    """The queue task_queue in a virtual host, and what the broker says about it."""

    def __init__(self, amqp_url: str) -> None:
        self.amqp_url = amqp_url
        parameters = pika.URLParameters(amqp_url.split(",")[0])
        parameters.heartbeat = 0  # nobody sends any while a million tasks are sent
        self._channel = pika.BlockingConnection(parameters).channel()
        self.fresh()

    def fresh(self) -> None:
        """Delete the queue with all that is in it, and declare it anew."""
        self._channel.queue_delete("task_queue")
        self._channel.queue_declare("task_queue", durable=True)

    def ready(self) -> int:
        """Return how many tasks wait in it."""
        return int(self._channel.queue_declare("task_queue", passive=True).method.message_count)

    def wait_for(self, count: int) -> None:
        """Wait until exactly so many tasks wait in it."""
        eventually(lambda: self.ready() == count, f"{count} tasks are in the queue", PATIENCE)

    def fill(self, count: int) -> None:
        """Put tasks into a fresh queue."""
        self.fresh()
        persistent = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
        for i in range(count):
            self._channel.basic_publish("", "task_queue", b"task %05d" % i, persistent)
        self.wait_for(count)

    def close(self) -> None:
        """Close the connection."""
        self._channel.connection.close()


class Bench:
    """A broker, and how much to measure on it."""

    def __init__(self, broker: Broker, scale: float = 1) -> None:
        self.broker = broker
        self._scale = scale

    def count(self, full: int, least: int = 3) -> int:
        """Return how many messages a run sends that sends `full` of them at full scale."""
        return max(int(full * self._scale), least)

    @contextmanager
    def queue(self, name: str, kind: str = "classic") -> Iterator[Queue]:
        """Open the queue task_queue in a virtual host of its own."""
        with self.virtual_host(name, kind) as url, ExitStack() as stack:
            queue = Queue(url)
            stack.callback(queue.close)
            yield queue

    @contextmanager
    def virtual_host(self, name: str, kind: str = "classic") -> Iterator[str]:
        """Make a virtual host where queues that are declared without a type are of this kind."""
        with self.broker.virtual_host(f"bench-{name}", default_queue_type=kind) as url:
            yield url

    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of queue that virtual_host can choose: 3.10 ignores what it asks for."""
        with self.queue("kinds", "quorum") as queue:
            path = f"queues/{virtual_host_of(queue.amqp_url)}/task_queue"
            kind = self.broker.api("GET", path)["type"]
            return ("classic", "quorum") if kind == "quorum" else ("classic",)

    def memory(self) -> float:
        """Return how much memory the broker says that it uses, in MB."""
        time.sleep(6 * min(self._scale, 1))  # the broker counts every five seconds
        return float(self.broker.api("GET", "nodes")[0]["mem_used"]) / 2**20
