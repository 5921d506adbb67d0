"""What is measured, and with what: tables of ways, and scripts whose lines are counted."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from statistics import median

import pika
from pika.adapters.blocking_connection import BlockingChannel

from tools import ROOT, environment
from tools.broker import Broker, eventually

PATIENCE = 120  # seconds for one run; it takes about one


def figure(value: float) -> str:
    """Return a number with three digits that count."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass
class Table:
    """Several ways to do the same. Each of them is run several times."""

    title: str
    about: str
    unit: str
    ways: dict[str, Callable[[], float]]  # each makes one run and returns its figure
    figures: dict[str, list[float]] = field(default_factory=dict)

    def run(self, way: str) -> None:
        """Make one run."""
        self.figures.setdefault(way, []).append(self.ways[way]())

    def markdown(self) -> str:
        """Return the section about it. A way is compared with the first one before its colon."""
        rows = [[self.unit, "median", "minimum", "maximum", "ratio"]]
        first: dict[str, float] = {}
        for way, values in self.figures.items():
            middle = median(values)
            ratio = middle / first.setdefault(way.rpartition(":")[0], middle)
            numbers = (middle, min(values), max(values), float(f"{ratio:.2g}"))
            rows.append([way, *map(figure, numbers)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        lines = (
            [name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])] for name, *numbers in rows
        )
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{self.about}\n\n{table}\n"


class Script(subprocess.Popen[bytes]):
    """A running Python script. Its output goes to a file, so that no reader slows it down."""

    def __init__(self, amqp_url: str, *command: str, line: str) -> None:
        """Start it. `line` is the beginning of those lines that are counted."""
        self._line = f"\n{line}".encode()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._read = self._counted = 0
        super().__init__(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(amqp_url, PYTHONPATH=str(ROOT)),
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def __exit__(self, *error: object) -> None:
        self.kill()
        super().__exit__(None, None, None)
        self._output.close()

    def wait_for(self, count: int) -> tuple[float, int]:
        """Wait until at least so many lines have come. Return when that was, and how many came."""
        deadline = time.monotonic() + PATIENCE
        while True:
            ended = self.poll() is not None or time.monotonic() > deadline
            data = os.pread(self._output.fileno(), 2**24, self._read)
            lines = data[: data.rfind(b"\n") + 1]  # the rest will come
            self._read += len(lines)
            self._counted += (b"\n" + lines).count(self._line)
            if self._counted >= count:
                return time.perf_counter(), self._counted
            if ended:
                last = os.pread(self._output.fileno(), 500, max(self._read - 500, 0))
                raise RuntimeError(f"{self.args!r} printed too little: {last!r}")
            time.sleep(0.001)


class Queue:
    """The queue task_queue in a virtual host."""

    def __init__(self, channel: BlockingChannel, amqp_url: str) -> None:
        self._channel = channel
        self.amqp_url = amqp_url

    def fresh(self) -> None:
        """Delete the queue with all that is in it, and declare it anew."""
        self._channel.queue_delete("task_queue")
        self._channel.queue_declare("task_queue", durable=True)

    def wait_for(self, count: int) -> None:
        """Wait until exactly so many tasks wait in it."""

        def ready() -> int:
            return int(self._channel.queue_declare("task_queue", passive=True).method.message_count)

        eventually(lambda: ready() == count, f"{count} tasks are in the queue", PATIENCE)

    def fill(self, count: int) -> None:
        """Put tasks into a fresh queue."""
        self.fresh()
        persistent = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
        for i in range(count):
            self._channel.basic_publish("", "task_queue", b"task %05d" % i, persistent)
        self.wait_for(count)


@dataclass
class Bench:
    """A broker, and how much to measure on it."""

    broker: Broker
    scale: float = 1

    def count(self, full: int) -> int:
        """Return how many messages a run sends that sends `full` of them at full scale."""
        return max(int(full * self.scale), 3)

    @property
    def kinds(self) -> list[str]:
        """The kinds of queue that a virtual host can have by default."""
        return ["classic"] if self.broker.version.startswith("3.10.") else ["classic", "quorum"]

    @contextmanager
    def queue(self, name: str, kind: str = "classic") -> Iterator[Queue]:
        """Open a queue in a virtual host where queues are of this kind."""
        with self.broker.virtual_host(f"bench-{name}", default_queue_type=kind) as url:
            parameters = pika.URLParameters(url.split(",")[0])
            parameters.heartbeat = 0  # nobody sends any during a run
            with closing(pika.BlockingConnection(parameters)) as connection:
                yield Queue(connection.channel(), url)
