"""Measure how fast the scripts are, and write tables and charts.

python -m tools.bench [--broker auto|container|local|URL] [-k PART ...] [--alternatives]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from tools.bench import report
from tools.bench.alternatives import alternatives
from tools.bench.measure import Bench, Table
from tools.bench.parts import PARTS as OURS
from tools.broker import NoBroker, start

PARTS = {**OURS, "alternatives": alternatives}  # these only if they are asked for

console = Console(highlight=False, soft_wrap=True)


def measured(bench: Bench, names: list[str], runs: int) -> Iterator[Table]:
    """Measure these parts, show how far it is, and yield each table when it is complete."""
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as shown:
        for name in names:
            task = shown.add_task(f"{name}: getting ready", total=None)
            try:
                for table in PARTS[name](bench):
                    total = table.runs or runs
                    shown.update(task, total=total * len(table.ways), completed=0)
                    for _ in range(total):
                        for way in table.take():
                            shown.update(task, description=f"{table.name}: {way}", advance=1)
                    console.print(f"\n{report.markdown(table)}")
                    yield table
                    shown.update(task, description=f"{name}: getting ready", total=None)
            except NoBroker as error:
                console.print(f" [!] {name} is left out: {error}")
            shown.remove_task(task)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--broker", default="auto", metavar="auto|container|local|URL")
    parser.add_argument("-k", dest="parts", nargs="+", choices=PARTS, help="only these parts")
    parser.add_argument("--alternatives", action="store_true", help="measure other clients, too")
    parser.add_argument("--runs", type=int, default=5, help="how often each way is run")
    parser.add_argument("--scale", type=float, default=1, help="how many messages a run sends")
    parser.add_argument("--output", type=Path, default=Path("bench"), help="the folder to write")
    options = parser.parse_args()
    names = options.parts or list(OURS)
    names += ["alternatives"] * options.alternatives

    for number in (signal.SIGINT, signal.SIGTERM):  # a job in the background has SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    load = os.getloadavg()[0]
    try:
        with closing(start(options.broker)) as broker:
            head = report.about(broker, load)
            console.print(head)
            tables: list[Table] = []
            for table in measured(Bench(broker, options.scale), names, options.runs):
                tables.append(table)
                report.write(options.output, head, tables)
    except NoBroker as error:
        sys.exit(f" [!] {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if not tables:
        sys.exit(1)
    console.print(f"The tables are in {options.output}/README.md, with a chart for each of them.")


if __name__ == "__main__":
    main()
