"""Makes the pictures of the README, of lesson 2 and of lesson 9 from what really happens.

    make .venv/has-pictures && apt-get install chromium
    .venv/bin/python -m tools.pictures [--broker auto|container|local]

`tools/demo.svg` is a recording of the section "Run it" of lesson 2: its terminals side by side, at
their own speed. `work_queues/management.png` is RabbitMQ's page while two workers work.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from html import escape
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tools import ROOT, environment
from tools.broker import Broker, Cluster, NoBroker, eventually, start
from tools.lesson import steps
from tools.player import play

LESSON = ROOT / "work_queues" / "README.md"
ROWS = (("producer",), ("worker 1", "worker 2"))  # of its terminals
COLOURS = {"producer": "#f2c14e", "worker 1": "#7fd1b9", "worker 2": "#8ab6f9"}

WIDTH, GAP, MARGIN, BAR = 800, 10, 12, 27  # pixels; a bar has the name of its terminal
COLUMN, LINE = 7.9, 19  # of a character
STILL = 5  # seconds that all lines are shown, before the recording begins again

STYLE = """\
text { font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #d8dbe2 }
text { white-space: pre }
.typed { fill: #fff; font-weight: bold }
.at { fill: #7d8496; text-anchor: end }
"""


def record(broker: Broker) -> list[tuple[float, str, str]]:
    """Play the lesson, and return each line: when it came, the name of its terminal, and itself."""
    lines: list[tuple[float, str, str]] = []
    play(steps(LESSON, "Run it"), broker, lambda *line: lines.append((time.monotonic(), *line)))
    begin = lines[0][0]
    return [(at - begin, name, line) for at, name, line in lines]


def draw_lines(recorded: list[tuple[float, str, str]], name: str, width: int) -> list[str]:
    """Return the rows of a terminal, as text of an SVG. A long line takes several."""
    columns = int((width - 2 * MARGIN) / COLUMN)
    rows: list[str] = []
    for i, (at, terminal, line) in enumerate(recorded):
        if terminal != name:
            continue
        typed = ' class="typed"' if re.match(r"[$>] |\^C", line) else ""
        for part in re.findall(f".{{1,{columns}}}", line) or [""]:
            place = f'y="{BAR + 22 + LINE * len(rows)}" style="animation-name: l{i}"'
            rows.append(f'<text x="{MARGIN}" {place}{typed}>{escape(part)}</text>')
        if len(part) < columns - 7:
            rows[-1] += f'<text x="{width - MARGIN}" {place} class="at">{at:.1f} s</text>'
    return rows


def draw(recorded: list[tuple[float, str, str]]) -> str:
    """Return an SVG that shows all lines for a while, and then each one when it came.

    A program that shows no animations shows all lines.
    """
    seconds = STILL + recorded[-1][0]
    frames, panes, y = "", "", 0
    for i, (at, _, _) in enumerate(recorded):
        hidden, shown = (f"{100 * (STILL + t) / seconds:.2f}%" for t in (0, at))
        frames += f"@keyframes l{i} {{ {hidden} {{ opacity: 0.2 }} {shown} {{ opacity: 1 }} }}\n"
    for row in ROWS:
        width = (WIDTH - GAP * (len(row) - 1)) // len(row)
        contents = {name: draw_lines(recorded, name, width) for name in row}
        height = BAR + 18 + LINE * max(map(len, contents.values()))
        for i, name in enumerate(row):
            lines = "\n".join(contents[name])
            panes += f"""\
<g transform="translate({i * (width + GAP)} {y})" xml:space="preserve">
<rect width="{width}" height="{height}" rx="7" fill="#3a404d"/>
<rect width="{width}" height="{height - BAR}" rx="7" fill="#1d2026" y="{BAR}"/>
<text x="{MARGIN}" y="18" style="fill: {COLOURS[name]}; font-weight: bold">{name}</text>
{lines}
</g>
"""
        y += height + GAP
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - GAP}" width="{WIDTH}">
<title>A producer and two workers, each in its own terminal. The workers share the tasks.</title>
<style>
{STYLE}@media (prefers-reduced-motion: no-preference) {{
text {{ animation: {seconds:.1f}s step-end infinite }}
{frames}}}
</style>
{panes}</svg>
"""


def photograph(broker: Broker, file: Path) -> None:
    """Take a picture of the page with the queues while two workers do the first of six tasks."""
    with ExitStack() as stack:

        def run(*command: str) -> subprocess.Popen[bytes]:
            env, python = environment(broker.amqp_url), sys.executable
            process = subprocess.Popen([python, *command], env=env, stdout=subprocess.DEVNULL)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        for _ in range(2):
            run("work_queues/worker.py")
        for _ in range(6):
            run("work_queues/new_task.py", "Long" + "." * 60).wait()

        def counted() -> bool:
            queue = broker.api("GET", "queues/%2F/task_queue")
            return (queue["messages_ready"], queue["messages_unacknowledged"]) == (4, 2)

        eventually(counted, "the page's figures are those of now")
        page = stack.enter_context(management_page(broker, height=415))
        page.goto(f"{broker.management_url}/#/queues")
        page.get_by_role("row", name=re.compile(r"task_queue.*running\s+4\s+2\s+6")).wait_for()
        page.screenshot(path=file)


@contextmanager
def management_page(broker: Broker, height: int) -> Iterator[Page]:
    """Log in to the management page of a broker, in a browser of this height."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1000, "height": height})
        page.goto(broker.management_url)
        page.fill("input[name=username]", "guest")
        page.fill("input[name=password]", "guest")
        page.click("input[type=submit]")
        page.wait_for_selector("#menu")
        yield page
        browser.close()


def photograph_cluster(cluster: Cluster, folder: Path) -> None:
    """Take pictures of the table of the nodes, and of what is said about a queue with members."""
    cluster.start()
    env = environment(cluster.amqp_url)
    subprocess.run([sys.executable, "work_queues/new_task.py"], env=env, check=True)
    with management_page(cluster, height=1300) as page:
        page.get_by_text("Uptime").wait_for()
        page.wait_for_function("!document.body.innerText.includes('not available')")
        page.locator("table.list", has_text="rabbit@rabbit3").first.screenshot(
            path=folder / "nodes.png"
        )
        page.goto(f"{cluster.management_url}/#/queues/%2F/task_queue")
        page.locator("table.facts", has_text="Members").first.screenshot(path=folder / "queue.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.pictures", description=__doc__)
    parser.add_argument("--broker", default="auto", metavar="auto|container|local|cluster")
    options = parser.parse_args()

    if options.broker == "cluster":
        with closing(Cluster()) as cluster:
            photograph_cluster(cluster, ROOT / "cluster")
        return
    try:
        broker = start(options.broker)
    except NoBroker as error:
        sys.exit(f" [!] {error}")
    with closing(broker):
        if not broker.owned:
            parser.error("argument --broker: the pictures need a broker of their own")
        (ROOT / "tools" / "demo.svg").write_text(draw(record(broker)), encoding="utf-8")
        photograph(broker, LESSON.with_name("management.png"))


if __name__ == "__main__":
    main()
