"""What was measured, as tables in Markdown and as charts."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from tools.bench.measure import Table
from tools.broker import Broker

LIBRARIES = ("pika", "aio-pika", "amqpstorm", "celery", "faststream", "kombu")
FIRST_LINES = """\
# How fast are the scripts?

`make bench` measures this on your own computer. The figures here are from one run of it. Other
computers have other figures: compare the ratios.

Each line of a table is one way to do something. In each turn, every way of the table is run once.
There are several turns, and the table shows the minimum, the median and the maximum of each way.
The ratio says how many times as fast a way is as the first way of its table, or as the first one
with the same colour in the chart. It is calculated for each turn, and the table shows the median.
"""


def figure(value: float) -> str:
    """Return a number with three digits that count."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def versions() -> str:
    """Return the versions of the libraries that are installed."""
    found = [f"Python {platform.python_version()}"]
    for library in LIBRARIES:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def machine() -> str:
    """Return what this computer is."""
    name = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} processors ({name or platform.machine()}), {memory:.0f} GB, "
        f"{platform.system()} {platform.release().partition('-')[0]}"
    )


def about(broker: Broker, load: float) -> str:
    """Return the lines that stand above the tables. `load` is that at the beginning."""
    return (
        f"- date: {datetime.now(timezone.utc):%Y-%m-%d}\n"
        f"- broker: {broker}\n"
        f"- machine: {machine()}; load {load:.1f} before it began\n"
        f"- versions: {versions()}\n"
    )


def markdown(table: Table) -> str:
    """Return the section about a table."""
    columns = ["minimum", "median", "maximum", "ratio"] if table.runs != 1 else [table.unit]
    lines = [
        f"## {table.title}\n\n{table.about}\n\n![{table.title}]({table.name}.svg)\n",
        f"| {table.unit if len(columns) > 1 else 'what'} | {' | '.join(columns)} |",
        f"| --- |{' --: |' * len(columns)}",
    ]
    for way, values in table.figures.items():
        numbers = [f(values) for f in (min, median, max)] + [table.ratio(way)]
        lines.append(" | ".join([f"| {way}", *map(figure, numbers[: len(columns)])]) + " |")
    return "\n".join(lines) + "\n"


def chart(table: Table, path: Path) -> None:
    """Draw a table: a bar is the median, and the line in it is from the minimum to the maximum."""
    import matplotlib as mpl  # it takes a second

    mpl.use("svg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": table.name, "font.size": 10}
    from matplotlib import pyplot as plt

    ways, runs = list(table.figures), list(table.figures.values())
    middle = [median(values) for values in runs]
    below = [m - min(values) for m, values in zip(middle, runs, strict=True)]
    above = [max(values) - m for m, values in zip(middle, runs, strict=True)]
    drawn, axes = plt.subplots(figsize=(9, 0.9 + 0.36 * len(ways)), layout="constrained")
    colours = [f"C{i // table.group}" for i in range(len(ways))]
    axes.barh(ways, middle, xerr=[below, above], color=colours, ecolor="0.3", capsize=2)
    if max(middle) > 20 * min(middle):
        axes.set_xscale("log")
        axes.set_xlabel(f"{table.unit}: each mark is ten times as much as the one before")
    else:
        axes.set_xlabel(table.unit)
    axes.xaxis.set_major_formatter("{x:,g}")
    for i, values in enumerate(runs):
        axes.annotate(
            figure(middle[i]), (max(values), i), (4, 0), textcoords="offset points", va="center"
        )
    axes.set_title(table.title, loc="left")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    drawn.savefig(path, metadata={"Date": None})
    plt.close(drawn)


def write(folder: Path, head: str, tables: list[Table]) -> None:
    """Write README.md with these tables, and a chart for the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [FIRST_LINES, head, *map(markdown, tables)]
    (folder / "README.md").write_text("\n".join(sections), encoding="utf-8")
    chart(tables[-1], folder / f"{tables[-1].name}.svg")
