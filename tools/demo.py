"""Plays the section "Run it" of each lesson, and shows every line as it is printed.

    python -m tools.demo [--broker auto|container|local|URL]

Exit status 1 says that a line that must come did not.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tools import environment
from tools.broker import Broker, NoBroker, start
from tools.lessons import LESSONS, LessonError, Player, console_blocks
from tools.stage import copy_tutorial, terminal_path

SECTION = "Run it"


def say(line: str) -> None:
    print(line, flush=True)


def play(documents: Sequence[Path], broker: Broker, say: Callable[[str], None] = say) -> None:
    """Play the section of each document in a virtual host of its own. Raises LessonError."""
    for document in documents:
        story = console_blocks(document, SECTION)
        width = max((len(block.terminal) for block in story), default=0)

        def show(terminal: str, line: str, width: int = width) -> None:
            say(f"{terminal:<{width}} | {line}")

        title = re.search(r"^# +(.*\S)", document.read_text(encoding="utf-8"), re.MULTILINE)
        say(f"\n=== {title[1] if title else document.parent.name}\n")
        with (
            broker.virtual_host(f"demo-{os.getpid()}") as url,
            tempfile.TemporaryDirectory() as folder,
            Player(
                environment(url, PATH=terminal_path()), copy_tutorial(Path(folder)), show
            ) as player,
        ):
            player.play(story)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--broker", default="auto", metavar="auto|container|local|URL")
    options = parser.parse_args()

    for number in (signal.SIGINT, signal.SIGTERM):  # a job in the background has SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    broker = None
    try:
        broker = start(options.broker)
        say(str(broker))
        play(LESSONS, broker)
        say("\n=== All lessons went as their texts say")
    except NoBroker as error:
        sys.exit(f" [!] {error}")
    except LessonError as error:
        sys.exit(f"\n [!] The demo failed. {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if broker:
            broker.close()


if __name__ == "__main__":
    main()
