"""A terminal with a bash in it, as a reader has it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pexpect

WIDTH = 120  # columns
PROMPT = "\x1e"  # a character that no program prints
PLAIN = {"PS1": r"\036", "PS2": r"\036", "TERM": "dumb", "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}


class Terminal:
    """An interactive bash on a terminal of its own."""

    def __init__(self, env: Mapping[str, str], folder: Path, show: Callable[[str], None]) -> None:
        """Open it. `show` gets each line when it is typed or printed."""
        self.at_prompt = False  # bash waits for a command
        self.unread: list[str] = []  # the lines that came
        self._show = show
        self._interrupted = False
        self._bash = pexpect.spawn(
            "bash",
            # -b: bash says at once that a job in the background has ended, not before a prompt
            ["--norc", "--noprofile", "--noediting", "-b", "-i"],
            env={**env, **PLAIN},
            cwd=folder,
            echo=False,  # what is typed is not output
            encoding="utf-8",
            codec_errors="backslashreplace",
            dimensions=(50, WIDTH),
        )
        self._bash.delaybeforesend = None
        self.fileno = self._bash.fileno  # for select

    def type(self, line: str) -> None:
        """Type what stands behind the prompt in this line, and Enter."""
        self._show(line)
        self.at_prompt = self._interrupted = False
        self._bash.send(f"{line[2:]}\n")

    def interrupt(self) -> None:
        """Press Ctrl+C."""
        self._show("^C")
        self._interrupted = True
        self._bash.sendintr()

    def receive(self) -> None:
        """Take in what was printed."""
        ends = (PROMPT, "\r\n", pexpect.TIMEOUT, pexpect.EOF)
        while (end := self._bash.expect_exact(ends, timeout=0)) < 2:
            self.at_prompt |= end == 0
            # A line that was written anew, from its beginning, shows what was written last.
            line = str(self._bash.before).rstrip("\r").rpartition("\r")[2].rstrip()
            # A prompt ends a line, too. After Ctrl+C bash ends the line that would show ^C.
            if line or (end == 1 and not self._interrupted):
                self._interrupted = False
                self.unread.append(line)
                self._show(line)

    def idle(self) -> bool:
        """Tell whether each thread of what runs in the foreground waits for something."""
        threads = Path(f"/proc/{os.tcgetpgrp(self.fileno())}/task")  # there is none but on Linux
        try:
            states = [stat.read_text() for stat in threads.glob("*/stat")]
        except OSError:  # a thread has ended meanwhile
            return False
        return not any(re.search(r"\) [RD] ", state) for state in states)  # runs, or reads a disk

    def close(self) -> None:
        """Hang up, as when a window is closed: bash ends what runs in it."""
        self._bash.close(force=True)
