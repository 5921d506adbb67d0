"""Plays the steps of a lesson in real terminals, and compares what comes with what it shows."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from tools import ROOT, TIMEOUT, environment
from tools.broker import Broker, Compose, Project
from tools.lesson import ANYTHING, LessonError, Step, without_docker
from tools.terminal import Terminal

Show = Callable[[str, str], None]  # takes the name of a terminal, and a line of it


def show_nothing(_terminal: str, _line: str) -> None:
    """Show nobody what comes."""


class NeedsDocker(LessonError):  # noqa: N818
    """Steps are about containers, and the broker is in none that Docker Compose has started."""


class Player:
    """Plays steps. It is a context manager: at its end all terminals are closed."""

    def __init__(
        self,
        env: Mapping[str, str],
        folder: Path,
        show: Show = show_nothing,
        timeout: float = TIMEOUT,
    ) -> None:
        """Take the terminals' environment and folder, and what is called with each line.

        `timeout` is how many seconds a line, or the prompt, may take to come.
        """
        self._env = env
        self._folder = folder
        self._show = show
        self._timeout = timeout
        self._terminals: dict[str, Terminal] = {}
        self._skipping: set[Terminal] = set()  # the last step there was `…`

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        for terminal in self._terminals.values():
            terminal.close()

    def play(self, story: Sequence[Step]) -> None:
        """Play steps, in their order, to the end. Raises LessonError."""
        for i, step in enumerate(story):
            terminal = self._terminal(step)
            self._play(terminal, step)
            following = next((s for s in story[i + 1 :] if s.terminal == step.terminal), None)
            if following is None or following.is_command:
                self._wait_for_prompt(terminal, step)
                self._refuse_more(terminal, step)
        for last in {step.terminal: step for step in story}.values():
            self._refuse_more(self._terminals[last.terminal], last)

    def _terminal(self, step: Step) -> Terminal:
        """Return the terminal of a step, at its first prompt if it is new."""
        name = step.terminal
        if name not in self._terminals:
            terminal = Terminal(self._env, self._folder, partial(self._show, name))
            self._terminals[name] = terminal
            self._wait_for_prompt(terminal, step)
        return self._terminals[name]

    def _play(self, terminal: Terminal, step: Step) -> None:
        if step.text == ANYTHING:
            self._skipping.add(terminal)
        elif step.is_command:
            self._skipping.discard(terminal)
            terminal.type(step.text)
        elif step.text == "^C":
            self._refuse_more(terminal, step)
            if terminal.at_prompt:
                raise step.fails("nothing runs that Ctrl+C could stop")
            # What runs there does what is left to do after its last line. No reader is so fast
            # as to stop a worker between the line "Done" and the acknowledgement.
            self._wait(1, lambda: terminal.idle() and terminal.idle())
            terminal.interrupt()
        else:
            self._wait_for_line(terminal, step)

    def _wait_for_line(self, terminal: Terminal, step: Step) -> None:
        """Read the next line, which must be the step's; or, after `…`, the first that is."""
        read: list[str] = []

        def found() -> bool:
            while terminal.unread:
                read.append(terminal.unread.pop(0))
                if step.matches(read[-1]):
                    return True
                if terminal not in self._skipping:
                    raise step.fails(f"the text shows\n{step.text}\nbut what came is\n{read[-1]}")
            return False

        if not self._wait(self._timeout, found):
            raise step.fails(
                f"the text shows\n{step.text}\nbut it did not come within {self._timeout:g} "
                "seconds. The last lines that came:\n" + "\n".join(read[-10:])
            )
        self._skipping.discard(terminal)

    def _wait_for_prompt(self, terminal: Terminal, step: Step) -> None:
        if not self._wait(self._timeout, lambda: terminal.at_prompt):
            self._refuse_more(terminal, step)
            raise step.fails(f"what runs there did not end within {self._timeout:g} seconds")

    def _refuse_more(self, terminal: Terminal, step: Step) -> None:
        """Fail if there came more than the text has shown up to this step."""
        self._wait(0, lambda: False)
        if terminal.unread and terminal not in self._skipping:
            raise step.fails("then the text does not show\n" + "\n".join(terminal.unread))
        terminal.unread.clear()

    def _wait(self, seconds: float, done: Callable[[], bool]) -> bool:
        """Take in what all terminals print until it is done, and tell whether it was in time."""
        deadline = time.monotonic() + seconds
        while not done():
            ready = select.select(list(self._terminals.values()), [], [], min(seconds, 0.02))[0]
            for terminal in ready:
                terminal.receive()
            if time.monotonic() >= deadline:
                return done()
        return True


def play(
    story: Sequence[Step], broker: Broker, show: Show = show_nothing, timeout: float = TIMEOUT
) -> None:
    """Play steps on a broker, in a copy of the tutorial, as they may leave files in it.

    A broker that was started here is emptied for it. On any other one the steps have a virtual
    host of their own. A Compose project is started and removed by the steps. Raises LessonError.
    """
    with ExitStack() as stack:
        settings = {}
        if isinstance(broker, Project):
            url = broker.amqp_url
        elif not broker.owned:
            url = stack.enter_context(broker.virtual_host(f"lesson-{os.getpid()}"))
        else:
            url = broker.amqp_url
            broker.api("DELETE", "vhosts/%2F")
            broker.api("PUT", "vhosts/%2F", {})
        if isinstance(broker, Compose):
            settings = broker.settings
        elif broker.owned:
            story = [replace(step, text=without_docker(step.text)) for step in story]
            # bash finds functions in its environment under such names
            rabbitmqctl = shlex.join(broker.rabbitmqctl_command)
            settings = {
                "BASH_FUNC_rabbitmqctl%%": f'() {{ {rabbitmqctl} "$@"; }}',
                "RABBITMQ_MANAGEMENT_PORT": broker.management_url.rpartition(":")[2],
            }
        for step in story:
            if step.text.startswith("$ docker ") and not isinstance(broker, Compose):
                raise NeedsDocker(f"{step.fails('this needs Docker Compose')}")
            if step.text.startswith("$ docker compose up") and not isinstance(broker, Project):
                raise NeedsDocker(f"{step.fails('this starts a RabbitMQ of its own')}")
            if "/api/" in step.text and not broker.owned:
                raise NeedsDocker(f"{step.fails('this needs a RabbitMQ that was started here')}")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tutorial"
        left_out = shutil.ignore_patterns(".*", "__pycache__", "*.log", "secrets")
        shutil.copytree(ROOT, folder, ignore=left_out)
        player = stack.enter_context(Player(environment(url, **settings), folder, show, timeout))
        player.play(story)
