"""Makes the pictures of the README and the lessons, in this folder, from what really happens.

    python -m tools.pictures [--broker auto|container|local]

`demo.svg` is a recording of the demo, at its own speed. `management.png` is RabbitMQ's management
page while two workers work, in Chromium (Debian's package `chromium`).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from html import escape
from pathlib import Path
from typing import Any

from tests.scripts import Scripts
from tools.broker import Broker, NoBroker, eventually, start
from tools.lesson import lessons, steps
from tools.player import play

FOLDER = Path(__file__).parent

ROWS = 26  # of the recorded terminal
COLUMN, ROW = 8.4, 20  # pixels
BACKGROUND = "#1d2026"
COLOURS = ("#7fd1b9", "#f2c14e", "#8ab6f9")  # of a lesson's terminals, as they come in

SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">
<style>
text {{ font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre }}
g {{ animation: roll {seconds:.1f}s step-end infinite }}
@keyframes roll {{ {rolled} }}
g rect {{ animation: hide {seconds:.1f}s step-end infinite }}
@keyframes hide {{ {hidden} }}
@media (prefers-reduced-motion) {{ g, g rect {{ animation: none }} }}
</style>
<rect width="{width}" height="{height}" rx="8" fill="{background}"/>
<svg y="10" height="{view}" width="{width}">
<g fill="#d8dbe2">
{lines}
<rect y="{end}" width="{width}" height="{end}" fill="{background}"/>
</g>
</svg>
</svg>
"""


def record_demo(broker: Broker) -> str:
    """Play the demo, and return a recording: an SVG in which the lines come as they came."""
    begin = time.monotonic()
    seen: list[tuple[float, str]] = [(0, "$ make demo")]

    def record(text: str) -> None:
        seen.extend((time.monotonic() - begin, line) for line in text.split("\n"))

    for document in lessons():
        record(f"\n=== {document.parent.name}\n")
        play(steps(document, "Run it"), broker, lambda name, line: record(f"{name} | {line}"))
    seconds = time.monotonic() - begin + 4  # the last lines stay for a while

    names: list[str] = []
    lines, rolled, hidden = [], [], []
    for i, (at, line) in enumerate(seen):
        frame = f"{100 * at / seconds:.2f}% {{{{ transform: translateY({{}}px) }}}}".format
        rolled.append(frame(min(0, ROWS - 1 - i) * ROW))
        hidden.append(frame((i + 1 - len(seen)) * ROW))  # a cover over the lines still to come
        name, bar, rest = line.partition(" | ")
        if not bar:
            names = []  # another lesson
            span = f'<tspan fill="#fff" font-weight="bold">{escape(line)}</tspan>'
        else:
            if name not in names:
                names.append(name)
            colour = COLOURS[names.index(name) % len(COLOURS)]
            typed = ' fill="#fff" font-weight="bold"' if re.match(r"[$>] |\^C", rest) else ""
            span = (
                f'<tspan fill="{colour}">{escape(name)} |</tspan> '
                f"<tspan{typed}>{escape(rest)}</tspan>"
            )
        lines.append(f'<text xml:space="preserve" x="16" y="{i * ROW + 15}">{span}</text>')
    return SVG.format(
        width=round(max(len(line) for _, line in seen) * COLUMN) + 32,
        height=ROWS * ROW + 20,
        view=ROWS * ROW,
        seconds=seconds,
        background=BACKGROUND,
        end=len(seen) * ROW,
        rolled="\n".join(rolled),
        hidden="\n".join(hidden),
        lines="\n".join(lines),
    )


class Browser:
    """Chromium without a window, driven through the pipes of its DevTools protocol."""

    def __init__(self, width: int, height: int) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        command = [
            *("chromium", "--headless", "--no-sandbox", "--hide-scrollbars"),
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile.name}",
        ]
        # Chromium reads commands from descriptor 3, and answers on 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec 3<&{commands} 4>&{answers}; exec "$@"', "bash", *command],
            pass_fds=(commands, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._answers = os.fdopen(self._in, "rb")
        self._count = 0
        self._session: dict[str, str] = {}
        target = self._do("Target.createTarget", url="about:blank")["targetId"]
        page = self._do("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": page["sessionId"]}
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._do("Emulation.setDeviceMetricsOverride", **size)

    def _do(self, method: str, **parameters: object) -> Any:
        """Send one command and return its result."""
        self._count += 1
        command = {"id": self._count, "method": method, "params": parameters, **self._session}
        os.write(self._out, json.dumps(command).encode() + b"\0")
        while True:
            message = b""
            while not message.endswith(b"\0"):
                byte = self._answers.read(1)
                if not byte:
                    raise RuntimeError("Chromium ended")
                message += byte
            answer = json.loads(message[:-1])
            if answer.get("id") == self._count:
                return answer["result"]

    def go(self, url: str) -> None:
        """Open a page."""
        self._do("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Run JavaScript in the page, and return its value."""
        result = self._do("Runtime.evaluate", expression=script, returnByValue=True)
        return result["result"].get("value")

    def screenshot(self) -> bytes:
        """Return a picture of the page, a PNG."""
        return base64.b64decode(self._do("Page.captureScreenshot")["data"])

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        self._profile.cleanup()


def picture_management(broker: Broker) -> bytes:
    """Return a picture of the page with the queues while two workers do the first of six tasks."""
    scripts = Scripts(broker.amqp_url)
    browser = Browser(width=1000, height=415)
    try:
        for _ in range(2):
            worker = scripts.start("work_queues/worker.py")
            worker.expect(" [*] Waiting for tasks. To exit press CTRL+C")
        for _ in range(6):
            scripts.run("work_queues/new_task.py", "Long" + "." * 60)

        def counted() -> bool:
            queue = broker.api("GET", "queues/%2F/task_queue")
            return (queue["messages_ready"], queue["messages_unacknowledged"]) == (4, 2)

        eventually(counted, "the page's figures are those of now")
        browser.go(broker.management_url)
        field = "document.querySelector('input[name={}]').value = 'guest'"
        eventually(lambda: browser.run(field.format("username")), "the page for logging in")
        browser.run(field.format("password"))
        browser.run("document.querySelector('input[type=submit]').click()")
        eventually(lambda: browser.run("!!document.querySelector('#menu')"), "the first page")
        browser.run("location.hash = '#/queues'")
        row = r"/task_queue[^]*running\s+4\s+2\s+6/.test(document.body.innerText)"
        eventually(lambda: browser.run(row), "the page with the queues")
        return browser.screenshot()
    finally:
        browser.close()
        scripts.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.pictures", description=__doc__)
    parser.add_argument("--broker", default="auto", metavar="auto|container|local")
    options = parser.parse_args()

    try:
        broker = start(options.broker)
    except NoBroker as error:
        sys.exit(f" [!] {error}")
    try:
        if not broker.owned:
            parser.error("argument --broker: the pictures need a broker of their own")
        (FOLDER / "demo.svg").write_text(record_demo(broker), encoding="utf-8")
        (FOLDER / "management.png").write_bytes(picture_management(broker))
    finally:
        broker.close()


if __name__ == "__main__":
    main()
