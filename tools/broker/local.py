"""RabbitMQ without Docker: a private node of the installed rabbitmq-server."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from tools.broker.base import START_TIMEOUT, Broker, NoBroker, free_port

# Debian's command in the PATH changes to the user rabbitmq, who cannot write to our folder.
FOLDER = "/usr/lib/rabbitmq/bin"


def find_server() -> str | None:
    """Return the path of the installed rabbitmq-server, if there is one."""
    return shutil.which("rabbitmq-server", path=f"{FOLDER}{os.pathsep}{os.environ['PATH']}")


class LocalNode(Broker):
    """A node with its own ports, data and Erlang cookie, in a folder that is removed at its end."""

    owned = True
    kind = "a private node of the installed rabbitmq-server"

    def __init__(self, port: int | None = None, management_port: int | None = None) -> None:
        port, management_port = port or free_port(), management_port or free_port()
        super().__init__(
            f"amqp://guest:guest@127.0.0.1:{port}/%2F",
            f"http://127.0.0.1:{management_port}",
        )
        server = find_server()
        if server is None:
            raise NoBroker("No rabbitmq-server is installed")
        self._server = server
        self._home = Path(tempfile.mkdtemp(prefix="rabbitmq-"))
        (self._home / "rabbitmq.conf").write_text(
            f"listeners.tcp.local = 127.0.0.1:{port}\n"
            f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {management_port}\n"
        )
        (self._home / "plugins").write_text("[rabbitmq_management].\n")
        names = {
            "HOME": str(self._home),
            "ERL_EPMD_PORT": str(free_port()),  # of a port mapper of its own, which ends with it
            "RABBITMQ_NODENAME": "tutorial@localhost",
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
        }
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RABBITMQ_")}
        self._environment = {
            **plain,
            **names,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_RELAXED_COMMAND_CHECK": "1",  # epmd -kill always works
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_MNESIA_BASE": str(self._home / "data"),
            "RABBITMQ_LOG_BASE": str(self._home / "log"),
            "RABBITMQ_CONFIG_FILE": str(self._home / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._home / "plugins"),
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the node, so signals reach it
        }
        env = ["env", *(f"{name}={value}" for name, value in names.items())]
        self.rabbitmqctl_command = [*env, str(Path(server).with_name("rabbitmqctl"))]
        self._process: subprocess.Popen[bytes] | None = None
        self.start_or_close()

    def start(self) -> None:
        """Start the node, on the data that it has, and wait until it is ready."""
        with (self._home / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [self._server],
                env=self._environment,
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl+C in this terminal is not for the node
            )
        try:
            self.wait_until_ready()
        except NoBroker as error:
            printed = (self._home / "output").read_text(errors="replace")[-2000:]
            raise NoBroker(f"{error}\nrabbitmq-server printed:\n{printed}") from error

    def stop(self) -> None:
        """Stop the node with SIGTERM."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the node with SIGKILL."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, how)
            self._process.wait(START_TIMEOUT)
            self._process = None

    def close(self) -> None:
        """Kill the node and its port mapper, and remove its data."""
        self.kill()
        subprocess.run(["epmd", "-kill"], env=self._environment, capture_output=True)
        shutil.rmtree(self._home, ignore_errors=True)
