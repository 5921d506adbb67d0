"""Finds the blocks of the lessons, and plays the console blocks in real terminals.

A console block is what one terminal shows. Its first line names the terminal, as in `# worker 1`.
Blocks with the same name are the same terminal: one bash, open through the whole document. In them

- `$ COMMAND` is typed at the prompt, and so is `> MORE` of a command that goes on; `^C` is Ctrl+C;
- each other line is output, and must come next in this terminal. `…` stands for any text in a
  line; a line that is only `…` stands for any number of lines, also none.

What a terminal prints and no block shows is an error, and so is a terminal that is not back at its
prompt when the next command, or the end of the document, is due.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sybil import Document
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from tools import ROOT, TIMEOUT

FOLDERS = ("hello_world", "work_queues", "publish_subscribe", "rpc")
LESSONS = [ROOT / folder / "README.md" for folder in FOLDERS]
DOCUMENTS = [ROOT / "README.md", *LESSONS]

WIDTH = 120  # columns of a terminal
PROMPT = "\x1e"  # a character that no program prints
ANYTHING = "…"
JOB_ENDED = re.compile(r"\[\d+\][+ -]  ")  # "[1]+  Killed": bash says it before the next prompt

Show = Callable[[str, str], None]


class LessonError(AssertionError):
    """What happens is not what the text shows."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    section: str  # the heading `## …` that it is under
    line: int  # of its opening fence
    language: str
    source: str
    not_run: bool  # there is a comment `<!-- not run: REASON -->` on the line before it

    def __str__(self) -> str:
        return f"{self.document.parent.name}/{self.document.name}, line {self.line}"

    @property
    def terminal(self) -> str:
        """The name of the terminal that a console block is of. Raises LessonError."""
        name = re.match(r"# +(.*\S)", self.source)
        if not name:
            raise LessonError(f"{self}: a console block begins with its terminal's name: # NAME")
        return name[1]

    @property
    def steps(self) -> list[Step]:
        """The lines of a console block, without the terminal's name."""
        lines = self.source.splitlines()[1:]
        return [Step(self, self.line + 2 + i, text) for i, text in enumerate(lines)]


@dataclass(frozen=True)
class Step:
    """A line of a console block."""

    block: Block
    line: int
    text: str

    @property
    def is_command(self) -> bool:
        """Whether this line is typed, behind bash's prompt or its prompt for more."""
        return self.text.startswith(("$ ", "> "))

    def matches(self, came: str) -> bool:
        """Tell whether this line of the text is the line that came."""
        parts = _as_shown(self.text).split(ANYTHING)
        return re.fullmatch(".*".join(map(re.escape, parts)), _as_shown(came)) is not None

    def fails(self, why: str) -> LessonError:
        """Return the error that says where this is in the text, and why it fails."""
        document = f"{self.block.document.parent.name}/{self.block.document.name}"
        return LessonError(f"{document}, line {self.line}, terminal '{self.block.terminal}': {why}")


def _as_shown(line: str) -> str:
    """Return a line as the eye sees it: tabs are spaces, and spaces at its end are nothing."""
    return line.expandtabs().rstrip()


def blocks(document: Path) -> list[Block]:
    """Return all fenced blocks of a Markdown document."""
    text = document.read_text(encoding="utf-8")
    lexer = RawFencedCodeBlockLexer(re.compile(r"[ \t]*(?P<language>[^\n]*)\n"))
    regions = sorted(lexer(Document(text, str(document))), key=lambda region: region.start)
    found = []
    for region in regions:
        before = text[: region.start]
        headings = re.findall(r"^## +(.*\S)", before, re.MULTILINE)
        found.append(
            Block(
                document=document,
                section=headings[-1] if headings else "",
                line=before.count("\n") + 1,
                language=region.lexemes["language"].strip(),
                source=region.lexemes["source"],
                not_run=bool(re.search(r"<!-- not run: \S.* -->\n[ \t]*\Z", before)),
            )
        )
    return found


def console_blocks(document: Path, section: str | None = None) -> list[Block]:
    """Return the console blocks to play, of a document or of one of its sections."""
    return [
        block
        for block in blocks(document)
        if block.language == "console" and not block.not_run and section in (None, block.section)
    ]


def has_excerpt(script: str, excerpt: str) -> bool:
    """Tell whether the lines of an excerpt stand in a script, in one piece, maybe indented."""
    wanted = textwrap.dedent(excerpt).splitlines()
    lines = script.splitlines()
    return any(
        textwrap.dedent("\n".join(lines[i : i + len(wanted)])).splitlines() == wanted
        for i in range(len(lines) - len(wanted) + 1)
    )


class Terminal:
    """An interactive bash on a terminal of its own."""

    def __init__(
        self, name: str, env: Mapping[str, str], folder: Path, show: Show | None = None
    ) -> None:
        self.name = name
        self.came: list[str] = []  # all lines so far
        self.read = 0  # how many of them the text has shown
        self.skipping = False  # the text last showed a line that is only "…"
        self._show = show
        self._line = ""
        self._prompts = 0
        self._typed = 0
        self._interrupted = False
        self._decode = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode
        self.screen, keyboard = pty.openpty()
        attributes = termios.tcgetattr(keyboard)
        attributes[3] &= ~termios.ECHO  # what is typed is not output
        termios.tcsetattr(keyboard, termios.TCSANOW, attributes)
        fcntl.ioctl(keyboard, termios.TIOCSWINSZ, struct.pack("4H", 50, WIDTH, 0, 0))
        plain = {"PS1": PROMPT, "PS2": PROMPT, "TERM": "dumb", "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}
        # The terminal that a session's leader opens becomes the session's own: so there are jobs.
        bash = 'exec bash --norc --noprofile --noediting -i <"$0" >"$0" 2>&1'
        self._bash = subprocess.Popen(
            ["sh", "-c", bash, os.ttyname(keyboard)],
            stdin=keyboard,
            env={**env, **plain},
            cwd=folder,
            start_new_session=True,
        )
        os.close(keyboard)

    @property
    def at_prompt(self) -> bool:
        """Whether bash waits for a command."""
        return self._prompts > self._typed

    def type(self, line: str) -> None:
        """Type what stands behind the prompt in this line, and Enter."""
        if self._show and line.strip("$ "):
            self._show(self.name, line)
        self._typed += 1
        os.write(self.screen, os.fsencode(f"{line[2:]}\n"))

    def interrupt(self) -> None:
        """Press Ctrl+C."""
        if self._show:
            self._show(self.name, "^C")
        self._interrupted = True
        os.write(self.screen, b"\x03")

    def idle(self) -> bool:
        """Tell whether all threads of what runs in the foreground wait for something."""
        foreground = os.tcgetpgrp(self.screen)
        states = set()
        for path in Path("/proc").glob("[0-9]*/task/*/stat"):  # there are none but on Linux
            with contextlib.suppress(OSError):  # it has ended meanwhile
                stat = path.read_text(errors="replace")
                state, _parent, group, *_ = stat.rpartition(")")[2].split()
                if int(group) == foreground:
                    states.add(state)
        return states.isdisjoint("RD")  # none runs, or waits for a disk

    def receive(self) -> None:
        """Take in what the terminal has printed. Raises OSError when it is closed."""
        for part in re.split(rf"([\n{PROMPT}])", self._decode(os.read(self.screen, 65536))):
            if part == PROMPT:
                self._prompts += 1
            if part == "\n" or (part == PROMPT and self._line):
                self._end_line()
            elif part != PROMPT:
                self._line += part

    def _end_line(self) -> None:
        line, self._line = self._line.rstrip("\r"), ""
        if self._interrupted and not line:  # bash ends the line in which a terminal echoes ^C
            return
        self._interrupted = False
        self.came.append(line)
        if self._show:
            self._show(self.name, line)

    def unread(self) -> list[str]:
        """Return the lines that the text has not shown."""
        return self.came[self.read :]

    def close(self) -> None:
        """Hang up, as when a window is closed: bash ends what runs in it."""
        try:
            self._bash.send_signal(signal.SIGHUP)
            self._bash.wait(2)
        except subprocess.TimeoutExpired:
            self._bash.kill()
            self._bash.wait()
        finally:
            os.close(self.screen)


class Player:
    """Plays console blocks. It is a context manager: at its end all terminals are closed."""

    def __init__(
        self,
        env: Mapping[str, str],
        folder: Path = ROOT,
        show: Show | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        """Take the terminals' environment and folder, and whom to show each line as it comes.

        `timeout` is how many seconds a line, or the prompt, may take to come.
        """
        self._env = env
        self._folder = folder
        self._show = show
        self._timeout = timeout
        self._terminals: dict[str, Terminal] = {}

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        for terminal in self._terminals.values():
            terminal.close()

    def play(self, story: Sequence[Block]) -> None:
        """Play blocks, in their order, to the end. Raises LessonError."""
        last: dict[str, Step] = {}
        for i, block in enumerate(story):
            terminal = self._terminal(block.terminal)
            steps = block.steps
            if not steps:
                raise LessonError(f"{block}: nothing is typed or shown in this console block")
            for step in steps:
                self._play(terminal, step)
            last[terminal.name] = steps[-1]
            # A command whose output is not shown, or not wholly, is done when its prompt is back,
            # unless the text goes on with what it prints.
            after = (b for b in story[i + 1 :] if b.terminal == block.terminal)
            following = next((b.steps[0] for b in after if b.steps), None)
            unshown = steps[-1].is_command or steps[-1].text == ANYTHING
            if unshown and (following is None or following.is_command):
                self._wait_for_prompt(terminal, steps[-1])
        for name, step in last.items():
            self._wait_for_prompt(self._terminals[name], step)
        for name, step in last.items():
            self._refuse_more(self._terminals[name], step)

    def _terminal(self, name: str) -> Terminal:
        if name not in self._terminals:
            self._terminals[name] = Terminal(name, self._env, self._folder, self._show)
        return self._terminals[name]

    def _play(self, terminal: Terminal, step: Step) -> None:
        if step.is_command:
            self._wait_for_prompt(terminal, step)
            self._refuse_more(terminal, step)
            terminal.skipping = False
            terminal.type(step.text)
        elif step.text == "^C":
            self._refuse_more(terminal, step)
            if terminal.at_prompt:
                raise step.fails("nothing runs that Ctrl+C could stop")
            self._let_finish(terminal)
            terminal.interrupt()
        elif step.text == ANYTHING:
            terminal.skipping = True
        else:
            self._wait_for_line(terminal, step)

    def _wait_for_line(self, terminal: Terminal, step: Step) -> None:
        """Read the next line, which must be the step's; or, after `…`, the first that is."""
        for _ in self._until_timeout():
            while terminal.unread():
                line = terminal.came[terminal.read]
                if step.matches(line):
                    terminal.read += 1
                    terminal.skipping = False
                    return
                if not terminal.skipping:
                    raise step.fails(f"the text shows\n{step.text}\nbut what came is\n{line}")
                terminal.read += 1
            if JOB_ENDED.match(step.text) and terminal.at_prompt:
                terminal.type("$ ")
        seen = "\n".join(terminal.came[-10:])
        raise step.fails(
            f"the text shows\n{step.text}\nbut it did not come within {self._timeout:g} seconds. "
            f"The last lines that came:\n{seen}"
        )

    def _wait_for_prompt(self, terminal: Terminal, step: Step) -> None:
        for _ in self._until_timeout():
            if terminal.at_prompt:
                return
        came = "\n".join(terminal.unread())
        raise step.fails(
            f"what runs there did not end within {self._timeout:g} seconds"
            + (f", and the text does not show that it printed\n{came}" if came else "")
        )

    def _let_finish(self, terminal: Terminal) -> None:
        """Let what runs there do what is left to do after its last line, for a second at most.

        No reader is as fast as this program, which would press Ctrl+C between the line that says
        that a task is done and its acknowledgement.
        """
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline and not (terminal.idle() and terminal.idle()):
            self._receive(0.02)

    def _refuse_more(self, terminal: Terminal, step: Step) -> None:
        """Fail if there came more than the text has shown up to this step."""
        self._receive(0)
        if not terminal.skipping and terminal.unread():
            raise step.fails("the text does not show\n" + "\n".join(terminal.unread()))
        terminal.read = len(terminal.came)

    def _until_timeout(self) -> Iterator[None]:
        """Yield whenever something was printed in any terminal, until the time is over."""
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            self._receive(0.05)
            yield

    def _receive(self, seconds: float) -> None:
        """Take in what was printed in all terminals; wait for the first of it at most so long."""
        screens = {terminal.screen: terminal for terminal in self._terminals.values()}
        for screen in select.select(screens, [], [], seconds)[0]:
            try:
                screens[screen].receive()
            except OSError as error:  # of Linux, when the last process has left the terminal
                name = screens[screen].name
                raise LessonError(f"The terminal '{name}' was closed: its bash ended") from error
