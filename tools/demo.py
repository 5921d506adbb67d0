"""Plays the section "Run it" of each lesson, and shows every line when it comes.

    python -m tools.demo [--broker auto|container|local|cluster|secure|URL] [--all] [LESSON ...]

Whoever writes a lesson checks it with `python -m tools.demo --all hello_world/README.md`. Exit
status 1 says that what came is not what the text shows. The lesson on the cluster needs --broker
cluster, the one on users and TLS needs --broker secure, and no other lesson does.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tools.broker import Broker, Cluster, NoBroker, Secure, start
from tools.lesson import LessonError, Step, lessons, steps
from tools.player import NeedsDocker, play

COLOURS = ("green", "yellow", "blue", "magenta", "cyan")

console = Console(highlight=False, soft_wrap=True)  # without a terminal it prints plain text


def perform(story: list[Step], broker: Broker) -> None:
    """Play steps; show each line with its terminal, and the seconds since the first one."""
    names = list(dict.fromkeys(step.terminal for step in story))
    width = max(map(len, names))
    begin = 0.0

    def show(name: str, line: str) -> None:
        nonlocal begin
        begin = begin or time.monotonic()
        colour = COLOURS[names.index(name) % len(COLOURS)]
        bold = "bold" if line.startswith(("$ ", "> ", "^C")) else ""
        terminal, seconds = f"{name:<{width}} | ", f"{time.monotonic() - begin:5.1f} s  "
        console.print(Text.assemble((seconds, "dim"), (terminal, colour), (line, bold)))
        if console.is_terminal and line.startswith("$ "):
            time.sleep(1.5)  # one can read it, and what came before, and then it happens

    play(story, broker, show, timeout=60)  # a cluster needs a while to start


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("lessons", metavar="LESSON", type=Path, nargs="*")
    parser.add_argument(
        "--broker", default="auto", metavar="auto|container|local|cluster|secure|URL"
    )
    parser.add_argument("--all", action="store_true", help="play whole lessons")
    options = parser.parse_args()

    for number in (signal.SIGINT, signal.SIGTERM):  # a job in the background has SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    broker, left_out = None, 0
    try:
        projects = {"cluster": Cluster, "secure": Secure}
        broker = projects.get(options.broker, partial(start, options.broker))()
        console.print(broker)
        for document in options.lessons or lessons():
            title = document.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
            console.print(f"\n=== {title}\n", style="bold")
            try:
                perform(steps(document, None if options.all else "Run it"), broker)
            except NeedsDocker:
                console.print("Left out: this lesson starts a RabbitMQ of its own, with Docker.")
                left_out += 1
        result = "All went as the lessons say" + (f"; {left_out} left out" if left_out else "")
        console.print(f"\n=== {result}", style="bold")
    except (NoBroker, LessonError) as error:
        sys.exit(f" [!] {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if broker:
            broker.close()


if __name__ == "__main__":
    main()
