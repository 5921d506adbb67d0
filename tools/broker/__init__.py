"""A running RabbitMQ, wherever the tests, the demo or a reader run.

`start` gives one: an address that the user names, a container, or a private node of a locally
installed rabbitmq-server. What it started, it can also stop, kill and start again on the same data.
As a command it keeps a broker on localhost:5672 until Ctrl+C (`make broker`), or installs
rabbitmq-server where there is no other way to a broker (`--install`: `make test`, `make demo`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

import docker.errors
import pika
import requests
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient

ROOT = Path(__file__).parents[2]
IMAGE = os.environ.get("RABBITMQ_IMAGE") or "rabbitmq:4.3-management"
START_TIMEOUT = 60  # seconds, for a node to boot on a slow machine

# Debian's command in the PATH changes to the user rabbitmq, who cannot write to our folder.
SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
INSTALL = "apt-get install -y --no-install-recommends rabbitmq-server"


class NoBroker(Exception):  # noqa: N818
    """There is no RabbitMQ to be had in the way asked for; the text says why, and what to do."""


class NoServer(NoBroker):
    """There would be one, if rabbitmq-server were installed."""


def eventually(check: Callable[[], Any], what: str, timeout: float = 15) -> Any:
    """Ask again and again until `check` returns something true, and return that.

    An exception counts as no. Raises AssertionError after `timeout` seconds, saying `what`.
    """
    deadline = time.monotonic() + timeout
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = check()
        except Exception as error:
            last = error
        else:
            if last:
                return last
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {timeout} s; last seen: {last!r}")


def virtual_host_of(amqp_url: str) -> str:
    """Return the virtual host of an AMQP URL, quoted as in the URL: the opposite of `url_of`."""
    return amqp_url.rpartition("/")[2]


def free_port() -> int:
    """Return a port of this machine's that nobody listens on.

    It is none of those that Linux gives to outgoing connections: on one of them a client that
    tries to reach a stopped broker is, sooner or later, connected to itself.
    """
    while True:
        port = 20000 + secrets.randbelow(12768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Broker(ABC):
    """A RabbitMQ node: where it is, and what can be done with it."""

    owned = True  # started here, so it can be stopped, killed and administered
    kind: str
    why = ""  # it is this kind, if that needs a reason
    amqp_url: str  # of its default virtual host
    management_url: str

    def __str__(self) -> str:
        return f"RabbitMQ {self.version}, {self.kind}" + (f" ({self.why})" if self.why else "")

    @property
    def version(self) -> str:
        return str(self.api("GET", "overview")["rabbitmq_version"])

    def api(self, method: str, path: str, json: object = None) -> Any:
        """Call RabbitMQ's HTTP API. Returns the decoded answer; raises requests.HTTPError."""
        user = urlsplit(self.amqp_url)
        answer = requests.request(
            method,
            f"{self.management_url}/api/{path}",
            json=json,
            auth=(unquote(user.username or "guest"), unquote(user.password or "guest")),
            timeout=30,
        )
        answer.raise_for_status()
        return answer.json() if answer.content else None

    @contextlib.contextmanager
    def virtual_host(self, name: str) -> Iterator[str]:
        """Make a virtual host and yield its AMQP URL; it is gone, with all in it, afterwards."""
        path = f"vhosts/{quote(name, safe='')}"
        self.api("PUT", path, {})
        try:
            yield self.url_of(name)
        finally:
            self.api("DELETE", path)

    def url_of(self, virtual_host: str) -> str:
        """Return the AMQP URL of a virtual host of this broker."""
        return urlsplit(self.amqp_url)._replace(path=f"/{quote(virtual_host, safe='')}").geturl()

    def wait_until_ready(self) -> None:
        """Wait until clients and the HTTP API are served. Raises NoBroker after START_TIMEOUT."""
        try:
            eventually(self._answers, f"{self.kind} answers", START_TIMEOUT)
        except AssertionError as error:
            raise NoBroker(str(error)) from error

    def _answers(self) -> bool:
        pika.BlockingConnection(pika.URLParameters(self.amqp_url)).close()
        self.api("GET", "overview")
        return True

    def rabbitmqctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on the node and return what it prints; CalledProcessError if it fails."""
        command = [*self.rabbitmqctl_command, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def restart(self) -> None:
        """Stop the node in an orderly way and start it again on the same data."""
        self.stop()
        self.start()

    @property
    @abstractmethod
    def rabbitmqctl_command(self) -> list[str]:
        """The command line that runs rabbitmqctl on this node."""

    @abstractmethod
    def stop(self) -> None:
        """Stop the node in an orderly way."""

    @abstractmethod
    def kill(self) -> None:
        """Kill the node with SIGKILL."""

    @abstractmethod
    def start(self) -> None:
        """Start the node again on the same data, and wait until it is ready."""

    @abstractmethod
    def close(self) -> None:
        """End what was started, and leave nothing behind."""


class GivenBroker(Broker):
    """A broker that is there already. It is not ours to stop."""

    owned = False

    def __init__(self, url: str) -> None:
        host = urlsplit(url).hostname or "localhost"
        self.kind = f"at {host}"
        self.amqp_url = url
        self.management_url = os.environ.get("RABBITMQ_MANAGEMENT_URL") or f"http://{host}:15672"
        try:
            self._answers()
        except Exception as error:
            raise NoBroker(
                f"The broker at {host} does not serve AMQP, or not its HTTP API at "
                f"RABBITMQ_MANAGEMENT_URL ({self.management_url}): {type(error).__name__}"
            ) from None

    def _not_ours(self) -> Any:
        raise NoBroker("A broker given by its address is not stopped, started or administered")

    rabbitmqctl_command = property(_not_ours)
    stop = kill = start = _not_ours

    def close(self) -> None:
        """Leave it as it is."""


class Container(Broker):
    """A container of RABBITMQ_IMAGE, with fixed ports: they must outlive a restart."""

    def __init__(self, image: str = IMAGE) -> None:
        port, management_port = free_port(), free_port()
        self.kind = f"in a container of {image}"
        # testcontainers' helper removes what a killed run leaves behind; a run can do without it.
        settings = testcontainers_config
        if not settings.ryuk_disabled and container_problem(settings.ryuk_image):
            settings.ryuk_disabled = True
        self._container = DockerContainer(image)
        self._container.with_bind_ports(5672, port).with_bind_ports(15672, management_port)
        try:
            self._container.start()
            self._node = self._container.get_wrapped_container()
            host = self._container.get_container_host_ip().replace("localhost", "127.0.0.1")
            self.amqp_url = f"amqp://guest:guest@{host}:{port}/%2F"
            self.management_url = f"http://{host}:{management_port}"
            self.wait_until_ready()
        except docker.errors.DockerException as error:
            self.close()
            raise NoBroker(f"A container of {image} does not start: {error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def rabbitmqctl_command(self) -> list[str]:
        """The command line that runs rabbitmqctl in the container."""
        return ["docker", "exec", str(self._node.id), "rabbitmqctl"]

    def stop(self) -> None:
        """Stop the container with SIGTERM."""
        self._node.stop()

    def kill(self) -> None:
        """Kill the container with SIGKILL."""
        self._node.kill()
        self._node.wait()

    def start(self) -> None:
        """Start the container again on the same data, and wait until the node is ready."""
        self._node.start()
        self.wait_until_ready()

    def close(self) -> None:
        """Remove the container and its data."""
        self._container.stop()


class Compose(Broker):
    """The service of docker-compose.yml, as a project of its own and on ports of its own.

    `settings` is the environment in which a command `docker compose` is about this project,
    whatever a file .env says.
    """

    def __init__(self) -> None:
        port, management_port = free_port(), free_port()
        self.kind = f"in a container of {IMAGE}, by Docker Compose"
        self.amqp_url = f"amqp://guest:guest@127.0.0.1:{port}/%2F"
        self.management_url = f"http://127.0.0.1:{management_port}"
        self.project = f"tutorial-test-{port}"
        self.settings = {
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_FILE": str(ROOT / "docker-compose.yml"),
            "COMPOSE_DISABLE_ENV_FILE": "1",
            "COMPOSE_PROGRESS": "plain",
            "COMPOSE_ANSI": "never",
            "RABBITMQ_IMAGE": IMAGE,
            "RABBITMQ_PORT": str(port),
            "RABBITMQ_MANAGEMENT_PORT": str(management_port),
        }
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def run(self, *arguments: str) -> str:
        """Run docker compose and return what it prints; CalledProcessError if it fails."""
        return subprocess.run(
            ["docker", "compose", *arguments],
            check=True,
            env=os.environ | self.settings,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout

    @property
    def rabbitmqctl_command(self) -> list[str]:
        """The command line that runs rabbitmqctl in the service's container."""
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        return ["env", *settings, *["docker", "compose", "exec", "-T", "rabbitmq", "rabbitmqctl"]]

    def start(self) -> None:
        """Start the service on its data, unless it runs, and wait until compose calls it healthy.

        Raises what a client raises if it does not serve at once.
        """
        self.run("up", "--detach", "--wait")
        self._answers()

    def stop(self) -> None:
        """Stop the service with SIGTERM."""
        self.run("stop")

    def kill(self) -> None:
        """Kill the service with SIGKILL."""
        self.run("kill")

    def close(self) -> None:
        """Remove the service and its data."""
        self.run("down", "--volumes")

    def left(self) -> str:
        """Return the ids of this project's containers, volumes and networks."""
        mine = f"label=com.docker.compose.project={self.project}"
        kinds = (["ps", "-a"], ["volume", "ls"], ["network", "ls"])
        commands = (["docker", *kind, "-q", "--filter", mine] for kind in kinds)
        return "".join(subprocess.check_output(command, text=True) for command in commands)


class LocalNode(Broker):
    """A private node of the installed rabbitmq-server: its own ports, data and Erlang cookie."""

    def __init__(self, port: int | None = None, management_port: int | None = None) -> None:
        server = find_server()
        if server is None:
            raise NoServer("No rabbitmq-server is installed")
        port, management_port = port or free_port(), management_port or free_port()
        self.kind = "a private node of the installed rabbitmq-server"
        self.amqp_url = f"amqp://guest:guest@127.0.0.1:{port}/%2F"
        self.management_url = f"http://127.0.0.1:{management_port}"
        self._server = server
        self._home = Path(tempfile.mkdtemp(prefix="rabbitmq-"))
        (self._home / "rabbitmq.conf").write_text(
            f"listeners.tcp.local = 127.0.0.1:{port}\n"
            f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {management_port}\n"
        )
        (self._home / "plugins").write_text("[rabbitmq_management].\n")
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RABBITMQ_")}
        self._environment = plain | {
            "HOME": str(self._home),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(free_port()),  # ours alone, so that it can be ended, too
            "RABBITMQ_NODENAME": "tutorial@localhost",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_MNESIA_BASE": str(self._home / "data"),
            "RABBITMQ_LOG_BASE": str(self._home / "log"),
            "RABBITMQ_PID_FILE": str(self._home / "pid"),
            "RABBITMQ_CONFIG_FILE": str(self._home / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._home / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the node: it gets the signals
        }
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def rabbitmqctl_command(self) -> list[str]:
        """The command line that runs rabbitmqctl with the private node's cookie and name."""
        names = ("HOME", "ERL_EPMD_PORT", "RABBITMQ_NODENAME", "RABBITMQ_CONF_ENV_FILE")
        settings = [f"{name}={self._environment[name]}" for name in names]
        return ["env", *settings, str(self._server.with_name("rabbitmqctl"))]

    def start(self) -> None:
        """Start the node on its data, in a session of its own, and wait until it is ready."""
        with (self._home / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [self._server],
                env=self._environment,
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self.wait_until_ready()
        except NoBroker as error:
            said = (self._home / "output").read_text(errors="replace")[-2000:]
            raise NoBroker(f"{error}\nrabbitmq-server said:\n{said}") from error

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
        try:
            eventually(self._end_port_mapper, "epmd ends")
        finally:
            shutil.rmtree(self._home, ignore_errors=True)

    def _end_port_mapper(self) -> bool:
        """End epmd. It declines for as long as it has not noticed that the node is gone."""
        command = ["epmd", "-kill"]
        ended = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        return "not allowed" not in ended.stdout + ended.stderr


def find_server() -> Path | None:
    """Return the installed rabbitmq-server, if there is one."""
    if SERVER.exists():
        return SERVER
    found = shutil.which("rabbitmq-server")
    return Path(found).resolve() if found else None


def container_problem(image: str = IMAGE) -> str | None:
    """Say why no container of `image` can be started here, or None. Pulls the image if need be."""
    if shutil.which("docker") is None:
        return "There is no docker command"
    try:
        client = DockerClient().client
        client.ping()
    except (docker.errors.DockerException, requests.RequestException, OSError) as error:
        return (
            f"No Docker engine {'lets this user in' if 'Permission' in str(error) else 'answers'}"
        )
    try:
        client.images.get(image)
    except docker.errors.ImageNotFound:
        print(f"Pulling the image {image}", flush=True)
        try:
            client.images.pull(image)
        except (docker.errors.DockerException, requests.RequestException):
            return f"The image {image} is not here, and cannot be pulled"
    return None


def compose_problem() -> str | None:
    """Say why `docker compose` cannot be used, where there is an engine, or None."""
    answer = subprocess.run(["docker", "compose", "version"], capture_output=True)
    return None if answer.returncode == 0 else "The docker command has no compose plugin"


def choose(choice: str, compose: bool = False) -> tuple[Literal["container", "local"], str]:
    """Return what auto, container or local comes to on this machine, and the reason, if any.

    auto is a container (with `compose`, only if there is that, too), or else a local node.
    Raises NoBroker, or NoServer.
    """
    if choice not in ("auto", "container", "local"):
        raise NoBroker("A broker is auto, container, local, or an AMQP URL")
    problem = None
    if choice != "local":
        problem = container_problem() or (compose_problem() if compose else None)
        if problem is None:
            return "container", ""
        if choice == "container":
            raise NoBroker(f"{problem}. A broker that is no container: local, or an AMQP URL")
    if find_server() is None:
        raise NoServer(
            (f"{problem}, and no" if problem else "No") + " rabbitmq-server is installed. "
            "On Debian or Ubuntu, this installs it:\n"
            f"    sudo apt-get update && sudo {INSTALL}"
        )
    return "local", problem or ""


def is_url(choice: str) -> bool:
    """Say whether a choice is the address of a broker."""
    return choice.startswith(("amqp://", "amqps://"))


def check(choice: str = "auto") -> None:
    """Raise NoBroker if `start` could not even try to give what is chosen."""
    if not is_url(choice):
        choose(choice)


def start(choice: str = "auto") -> Broker:
    """Return a running RabbitMQ: `choice` is auto, container, local, or an AMQP URL.

    Installs nothing. Raises NoBroker.
    """
    if is_url(choice):
        return GivenBroker(choice)
    chosen, why = choose(choice)
    broker = Container() if chosen == "container" else LocalNode()
    broker.why = why
    return broker


def install(choice: str = "auto", compose: bool = False) -> None:
    """Install rabbitmq-server if `choice` needs it: as root, on Debian or Ubuntu. Raises NoBroker.

    Where an init system runs, the package also starts a service of its own, on port 5672, which
    the tests and the demo leave alone, and `make broker` says that it is there.
    """
    if is_url(choice):
        return
    try:
        choose(choice, compose)
    except NoServer as problem:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise
        print(f"{str(problem).partition('. ')[0]}: installing it, with apt-get", flush=True)
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in ("apt-get -qq update", INSTALL.replace("apt-get", "apt-get -qq")):
            done = subprocess.run(command.split(), env=quiet, stdout=subprocess.DEVNULL)
            if done.returncode:
                raise NoBroker(f"{command}: failed") from None


def speaks_amqp(port: int) -> bool:
    """Say whether a broker answers on a port of this machine. Raises NoBroker if others do."""
    try:
        with socket.create_connection(("localhost", port), timeout=5) as probe:
            probe.sendall(b"AMQP\0\0\x09\x01")
            answer = probe.recv(8)
    except ConnectionRefusedError:
        return False
    except OSError:
        answer = b""
    if answer[:1] == b"\x01":  # a method: connection.start
        return True
    raise NoBroker(f"Port {port} is taken, and not by a broker that is ready")


def serve(choice: str = "auto") -> None:
    """Keep a broker on localhost:5672 for a reader's scripts, until Ctrl+C or SIGTERM.

    RABBITMQ_PORT and RABBITMQ_MANAGEMENT_PORT change its ports. Raises NoBroker.
    """
    port = int(os.environ.get("RABBITMQ_PORT") or 5672)
    management_port = int(os.environ.get("RABBITMQ_MANAGEMENT_PORT") or 15672)
    if not speaks_amqp(port):
        install(choice, compose=True)
    if speaks_amqp(port):
        print(f"A broker is there already, on localhost:{port}: use that one, or stop it first.")
        print("(If it is the service of Debian's package: sudo systemctl stop rabbitmq-server)")
        return
    chosen, why = choose(choice, compose=True)
    print(f"Starting RabbitMQ{f' ({why})' if why else ''}", flush=True)
    with contextlib.ExitStack() as ending:
        if chosen == "container":
            # What compose would find in a file .env must not differ from what is said here.
            settings = {"RABBITMQ_IMAGE": IMAGE, "RABBITMQ_PORT": str(port)}
            settings |= {"RABBITMQ_MANAGEMENT_PORT": str(management_port)}
            compose = partial(subprocess.run, cwd=ROOT, env=os.environ | settings)
            ending.callback(compose, ["docker", "compose", "stop"])
            if compose(["docker", "compose", "up", "-d", "--wait"]).returncode:
                raise NoBroker("docker compose could not start RabbitMQ")
            rabbitmqctl = ["docker", "compose", "exec", "rabbitmq", "rabbitmqctl"]
        else:
            node = LocalNode(port, management_port)
            ending.callback(node.close)
            rabbitmqctl = node.rabbitmqctl_command
        print(f"RabbitMQ is on localhost:{port}, until Ctrl+C.")
        print(f"Its management page is http://localhost:{management_port} (guest, guest).")
        print("For your other scripts:")
        if sys.prefix != sys.base_prefix:
            print(f"    . {os.path.relpath(sys.prefix)}/bin/activate")
        if port != 5672:
            print(f"    export AMQP_URL=amqp://guest:guest@localhost:{port}/%2F")
        print(f"    alias rabbitmqctl={shlex.quote(shlex.join(rabbitmqctl))}", flush=True)
        while True:
            time.sleep(3600)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Keep a RabbitMQ on localhost:5672 until Ctrl+C.")
    parser.add_argument("--broker", default="auto", metavar="auto|container|local|URL")
    parser.add_argument("--install", action="store_true", help="install what it needs, no more")
    options = parser.parse_args()

    def stop(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        sys.exit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        (install if options.install else serve)(options.broker)
    except NoBroker as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
