"""The bench: each measurement, with few messages, gives its tables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import ROOT
from tools.bench.measure import Bench, Table
from tools.bench.parts import PARTS
from tools.broker import Broker, Container, virtual_host_of

pytestmark = pytest.mark.speed


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=getattr(pytest.mark, name)) if name == "cluster" else name
        for name in PARTS
    ],
)
def test_each_part_gives_its_figures(name: str, broker: Broker) -> None:
    """Each part of the bench measures each of its ways."""
    if name == "cluster" and not isinstance(broker, Container):
        pytest.skip("needs a Docker engine: --broker=container")
    for table in PARTS[name](Bench(broker, scale=0.002)):
        for way in table.ways:
            table.run(way)
            assert f"\n| {way} " in table.markdown()


def test_a_queue_is_of_the_kind_that_its_row_names(broker: Broker) -> None:
    """What is called a quorum queue in a table is one. Where it would not be, there is no row."""
    bench = Bench(broker)
    assert ("quorum" in bench.kinds) == (not broker.version.startswith("3.10."))
    for kind in bench.kinds:
        with bench.queue("of-a-kind", kind) as queue:
            queue.fresh()
            path = f"queues/{virtual_host_of(queue.amqp_url)}/task_queue"
            assert broker.api("GET", path)["type"] == kind


def test_the_command_measures_one_part(broker: Broker, tmp_path: Path) -> None:
    """The command shows and writes what it has measured, and what it was measured on."""
    command = [sys.executable, "-m", "tools.bench", "-k", "rpc", "--broker", broker.amqp_url]
    numbers = ["--scale", "0.002", "--runs", "2", "--output", str(tmp_path / "tables.md")]
    env = os.environ | {"RABBITMQ_MANAGEMENT_URL": broker.management_url}
    ended = subprocess.run([*command, *numbers], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended
    text = (tmp_path / "tables.md").read_text()
    for line in ("- date: 20", f"- broker: RabbitMQ {broker.version}", "pika 1.", "| 10 in flight"):
        assert line in text
        assert line in ended.stdout
    assert "guest:guest" not in text + ended.stdout


def test_a_table_compares_within_a_group() -> None:
    """The ratio is that of the medians: to the first way that has the same words before the
    colon."""
    table = Table("Title", "About.", "tasks/s", {})
    table.figures = {"a: x": [1, 10, 100], "a: y": [20, 2, 200], "b: x": [5], "b: y": [1]}
    rows = table.markdown().splitlines()
    assert rows[4] == "| tasks/s | median | minimum | maximum | ratio |"
    assert rows[7] == "| a: y    |     20 |       2 |     200 |     2 |"
    assert [row.split()[-2] for row in rows[6:]] == ["1", "2", "1", "0.2"]
