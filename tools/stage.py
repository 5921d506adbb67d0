"""Where the lessons play: a broker that they may upset, and the commands that they use.

The lessons restart the broker with `docker compose restart rabbitmq`, and look into it with
`docker compose exec rabbitmq rabbitmqctl`. With Docker Compose that is what happens, to a project
of the tests' own. Without it, a command of the same name does the same to the broker of the tests.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tools import ROOT, environment
from tools.broker import Broker, Container

STAND_IN = """\
#!/bin/sh
# Stands in for Docker Compose: the node that the tests started is its service "rabbitmq".
PATH={path}
case "$1 $2 $3" in
"compose exec rabbitmq")
    shift 3
    [ "$1" = rabbitmqctl ] && shift && exec {rabbitmqctl} "$@"
    ;;
"compose restart rabbitmq")
    echo restart >{asked}
    read -r answer <{answered}
    [ "$answer" = done ] && exit
    echo "$answer" >&2
    exit 1
    ;;
esac
echo "docker: this stand-in cannot do: $*" >&2
exit 1
"""


def copy_tutorial(folder: Path) -> Path:
    """Copy what a reader has to a new folder in this one, where lessons may leave files."""
    hidden = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "*.log")
    return shutil.copytree(ROOT, folder / "tutorial", ignore=hidden)


def terminal_path(*folders: Path) -> str:
    """Return the PATH of the terminals: these folders, this interpreter's, and the usual ones."""
    return os.pathsep.join(
        [*map(str, folders), str(Path(sys.executable).parent), os.environ["PATH"]]
    )


@contextlib.contextmanager
def stage(broker: Broker, folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment of the lessons' terminals. Files for it go to an empty folder.

    On a broker that was started here, the lessons have the default virtual host, emptied; on any
    other one they have a virtual host of their own, and no `docker compose`.
    """
    if not broker.owned:
        with broker.virtual_host(f"lesson-{os.getpid()}") as url:
            yield environment(url, PATH=terminal_path())
        return
    broker.api("DELETE", "vhosts/%2F")
    broker.api("PUT", "vhosts/%2F", {})
    if isinstance(broker, Container):
        yield environment(broker.amqp_url, PATH=terminal_path(), **broker.settings)
    else:
        with docker_stand_in(broker, folder):
            yield environment(broker.amqp_url, PATH=terminal_path(folder))


@contextlib.contextmanager
def docker_stand_in(broker: Broker, folder: Path) -> Iterator[None]:
    """Make a command `docker` in a folder that does to this broker what the lessons use it for."""
    asked, answered = folder / "asked", folder / "answered"
    for pipe in (asked, answered):
        os.mkfifo(pipe)
    command = folder / "docker"
    command.write_text(
        STAND_IN.format(
            path=shlex.quote(os.environ["PATH"]),
            rabbitmqctl=shlex.join(broker.rabbitmqctl_command),
            asked=shlex.quote(str(asked)),
            answered=shlex.quote(str(answered)),
        )
    )
    command.chmod(0o755)

    def serve() -> None:
        while asks.readline() != b"end\n":
            try:
                broker.stop()
                broker.start()
                answer = "done"
            except Exception as error:
                answer = repr(error).replace("\n", " ")
            answers.write(f"{answer}\n".encode())

    server = threading.Thread(target=serve, daemon=True)
    with (  # both ends of both pipes, so that nothing waits here for a command that was killed
        asked.open("r+b", buffering=0) as asks,
        answered.open("r+b", buffering=0) as answers,
    ):
        server.start()
        try:
            yield
        finally:
            asks.write(b"end\n")
            server.join()
