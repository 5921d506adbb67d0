"""The bench: each measurement, with few messages, gives its tables and its charts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools import ROOT
from tools.bench import report
from tools.bench.alternatives import CLIENTS, alternatives
from tools.bench.measure import Bench, Table
from tools.bench.parts import PARTS, Part
from tools.broker import Broker, Container, virtual_host_of

pytestmark = pytest.mark.speed

TINY = 0.002  # of the messages of a real run
ROW = re.compile(r"\| [^|]+( \| [\d,.]+)+ \|")


def check(part: Part, broker: Broker, folder: Path) -> None:
    """Measure a part once; each way has a figure, a row in a table and a bar in a chart."""
    tables = []
    for table in part(Bench(broker, TINY)):
        for _way in table.take():
            pass
        tables.append(table)
        report.write(folder, report.about(broker, 0), tables)
    assert tables
    text = (folder / "README.md").read_text()
    assert f"broker: {broker}" in text
    for table in tables:
        chart = (folder / f"{table.name}.svg").read_text()
        assert f"({table.name}.svg)" in text
        for way in table.ways:
            assert any(
                ROW.fullmatch(line) for line in text.splitlines() if line.startswith(f"| {way} |")
            )
            assert f">{way}</text>" in chart


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=getattr(pytest.mark, name)) if name == "cluster" else name
        for name in PARTS
    ],
)
def test_each_part_gives_its_figures(name: str, broker: Broker, tmp_path: Path) -> None:
    """Each part of the bench measures each of its ways, and writes its tables and charts."""
    if name == "cluster" and not isinstance(broker, Container):
        pytest.skip("needs a Docker engine: --broker=container")
    check(PARTS[name], broker, tmp_path)


def test_a_queue_is_of_the_kind_that_its_row_names(broker: Broker) -> None:
    """What is called a quorum queue in a table is one. Where it would not be, there is no row."""
    bench = Bench(broker, TINY)
    assert ("quorum" in bench.kinds()) == (not broker.version.startswith("3.10."))
    for kind in bench.kinds():
        with bench.queue("of-a-kind", kind) as queue:
            path = f"queues/{virtual_host_of(queue.amqp_url)}/task_queue"
            assert broker.api("GET", path)["type"] == kind


def test_the_alternatives_give_their_figures(broker: Broker, tmp_path: Path) -> None:
    """So do the scripts with other clients, where those are installed."""
    if not all(map(find_spec, CLIENTS)):
        pytest.skip("needs pip install '.[alternatives]'")
    check(alternatives, broker, tmp_path)


def test_the_command_measures_one_part(broker: Broker, tmp_path: Path) -> None:
    """The command shows and writes what it has measured, and what it was measured on."""
    command = [sys.executable, "-m", "tools.bench", "-k", "logs", "--broker", broker.amqp_url]
    numbers = ["--scale", str(TINY), "--runs", "2", "--output", str(tmp_path)]
    env = os.environ | {"RABBITMQ_MANAGEMENT_URL": broker.management_url}
    ended = subprocess.run([*command, *numbers], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended
    text = (tmp_path / "README.md").read_text()
    for line in ("- date: 20", f"- broker: RabbitMQ {broker.version}", "- machine: ", "pika 1."):
        assert line in text
        assert line in ended.stdout
    assert "guest:guest" not in text + ended.stdout
    assert (tmp_path / "logs.svg").exists()


def test_a_ratio_is_taken_within_one_turn() -> None:
    """A turn in which all was slow does not change a ratio, and each group has its own first."""
    table = Table("name", "Title", "About.", "tasks/s", dict.fromkeys("abcd", float), group=2)
    table.figures = {"a": [1, 10, 100], "b": [2, 20, 200], "c": [5, 5, 5], "d": [1, 5, 10]}
    assert [table.ratio(way) for way in "abcd"] == [1, 2, 1, 1]
    assert "| b | 2 | 20 | 200 | 2 |" in report.markdown(table)
