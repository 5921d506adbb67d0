"""Measures how fast the scripts are, and prints tables: `make bench`."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
from contextlib import closing
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import track

from tools.bench.measure import Bench
from tools.bench.parts import PARTS
from tools.broker import Broker, NoBroker, start

FIRST_LINES = """\
# How fast are the scripts?

`make bench` measures this on your own computer. The figures here are from one run of it. Other
computers have other figures: compare the ratios.

Each line of a table is one way to do something. In each turn, every way of the table is run once.
There are several turns, and the table shows the median, the minimum and the maximum of each way.
The ratio says how many times as fast a way is as the first way of its table, or as the first one
that has the same words before the colon.
"""


def about(broker: Broker) -> str:
    """Return the lines that stand above the tables."""
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("pika", "aio-pika", "amqpstorm", "kombu")
    )
    return (
        f"- date: {datetime.now(timezone.utc):%Y-%m-%d}\n"
        f"- broker: {broker}\n"
        f"- machine: {os.cpu_count()} processors ({platform.machine()}), {platform.system()}; "
        f"load {os.getloadavg()[0]:.1f} before it began\n"
        f"- versions: Python {platform.python_version()}, {libraries}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--broker", default="auto", metavar="auto|container|local|URL")
    parser.add_argument("-k", dest="parts", nargs="+", choices=PARTS, help="only these parts")
    parser.add_argument("--runs", type=int, default=5, help="how often each way is run")
    parser.add_argument("--scale", type=float, default=1, help="how many messages a run sends")
    parser.add_argument("--output", type=Path, help="write the tables to this file, too")
    options = parser.parse_args()

    for number in (signal.SIGINT, signal.SIGTERM):  # a job in the background has SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    console = Console(highlight=False, soft_wrap=True)
    sections = [FIRST_LINES]
    try:
        with closing(start(options.broker)) as broker:
            sections.append(about(broker))
            console.print(sections[-1])
            for name in options.parts or PARTS:
                try:
                    for table in PARTS[name](Bench(broker, options.scale)):
                        ways = list(table.ways) * options.runs
                        for way in track(ways, table.title, console=console, transient=True):
                            table.run(way)
                        sections.append(table.markdown())
                        console.print(sections[-1])
                        if options.output:
                            options.output.write_text("\n".join(sections), encoding="utf-8")
                except NoBroker as error:
                    console.print(f" [!] {name} is left out: {error}")
    except NoBroker as error:
        sys.exit(f" [!] {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
