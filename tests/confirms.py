"""What the tests of lesson 7 have in common: tasks, a pipe, and the queue that they end in."""

from __future__ import annotations

import os
from pathlib import Path

from pika.adapters.blocking_connection import BlockingChannel

from tests.scripts import NEW_TASKS, Script, Scripts, ready

REJECTED = " [!] The queue rejects tasks, perhaps it is full; trying again every second"
SILENCE = " [!] No answer from RabbitMQ for 10 seconds; still waiting"


def sent(tasks: int) -> str:
    """Return the line in which the script says that it has sent so many tasks."""
    return f" [x] Sent {tasks} tasks"


def numbers(count: int) -> list[bytes]:
    """Return the numbers from 1 as tasks."""
    return [b"%d" % number for number in range(1, count + 1)]


def send(scripts: Scripts, folder: Path, count: int, *options: str, url: str = "") -> Script:
    """Start the script with a file of numbered lines."""
    path = folder / f"{count} lines"
    path.write_bytes(b"\n".join(numbers(count)))
    return scripts.start(NEW_TASKS, *options, str(path), amqp_url=url or None)


class Pipe:
    """A pipe with a name. The script that reads it waits for more, until it is closed."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "pipe")
        os.mkfifo(self.path)
        self.end = os.open(self.path, os.O_RDWR)  # with O_WRONLY, this would wait for a reader

    def write(self, data: bytes) -> None:
        """Write, and wait while the pipe is full."""
        while data:
            data = data[os.write(self.end, data) :]

    def close(self) -> None:
        """Let the script see the end."""
        os.close(self.end)


def take_all(channel: BlockingChannel) -> list[bytes]:
    """Take all tasks out of the queue."""
    messages = channel.consume("task_queue", auto_ack=True)
    tasks = [body or b"" for _, (_, _, body) in zip(range(ready(channel)), messages, strict=False)]
    channel.cancel()
    return tasks
