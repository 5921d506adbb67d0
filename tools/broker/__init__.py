"""A running RabbitMQ, wherever the tests, the demo or a reader run.

`start` returns one: at an address that the user gives, in a container, or as a private node of the
installed rabbitmq-server. A `Cluster` is three of them. A `Secure` broker has TLS. A
`Service` is one with its workers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from urllib.parse import urlsplit

from tools.broker.base import Broker, NoBroker, eventually, free_port, virtual_host_of
from tools.broker.compose import IMAGE, Compose, Container, container_problem, remains
from tools.broker.local import LocalNode, find_server
from tools.broker.projects import Cluster, Project, Secure, Service

INSTALL = "apt-get install -y --no-install-recommends rabbitmq-server"


class NoServer(NoBroker):
    """RabbitMQ could be used if rabbitmq-server were installed."""


def choose(choice: str) -> tuple[type[Container | LocalNode], str]:
    """Return what auto, container or local means on this machine, and why, if there is a reason.

    auto is a container, or else a local node. Raises NoBroker, or NoServer.
    """
    if choice not in ("auto", "container", "local"):
        raise NoBroker("A broker is auto, container, local, or an AMQP URL")
    problem = container_problem() if choice != "local" else ""
    if choice == "container" and problem:
        raise NoBroker(f"{problem}. Without a container, choose local, or an AMQP URL")
    if choice != "local" and not problem:
        return Container, ""
    if find_server() is None:
        raise NoServer(
            (f"{problem}, and no" if problem else "No") + " rabbitmq-server is installed. "
            f"On Debian or Ubuntu, this installs it:\n    sudo apt-get update && sudo {INSTALL}"
        )
    return LocalNode, problem


def given(url: str) -> Broker:
    """Return the broker at an AMQP URL. Raises NoBroker if it does not answer."""
    host = urlsplit(url).hostname or "localhost"
    management_url = os.environ.get("RABBITMQ_MANAGEMENT_URL") or f"http://{host}:15672"
    broker = Broker(url, management_url)
    broker.kind = f"at {host}"
    try:
        broker.answers()
    except Exception as error:
        raise NoBroker(
            f"The broker at {host} does not serve AMQP, or not its HTTP API at "
            f"RABBITMQ_MANAGEMENT_URL ({management_url}): {type(error).__name__}"
        ) from None
    return broker


def is_url(choice: str) -> bool:
    """Say whether a choice is the address of a broker."""
    return choice.startswith(("amqp://", "amqps://"))


def check(choice: str) -> str:
    """Return what kind of broker `start` would return, and why. Raises NoBroker."""
    if is_url(choice):
        return given(choice).kind
    broker, why = choose(choice)
    return f"{broker.kind} ({why})" if why else broker.kind


def start(choice: str = "auto") -> Broker:
    """Return a running RabbitMQ: `choice` is auto, container, local, or an AMQP URL.

    Installs nothing. Raises NoBroker.
    """
    if is_url(choice):
        return given(choice)
    broker, why = choose(choice)
    if why:
        print(f"{why}, so this is the rabbitmq-server of this computer", flush=True)
    return broker()


def install(choice: str = "auto") -> None:
    """Install rabbitmq-server if `choice` needs it: as root, on Debian or Ubuntu. Raises NoBroker.

    Where an init system runs, the package also starts a service of its own on port 5672. The tests
    and the demo leave it alone, and `make broker` says that it is there.
    """
    if is_url(choice):
        return
    try:
        choose(choice)
    except NoServer as problem:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise
        print(f"{str(problem).partition('. ')[0]}: installing it with apt-get", flush=True)
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in ("apt-get -qq update", INSTALL.replace("apt-get", "apt-get -qq")):
            if subprocess.run(command.split(), env=quiet, stdout=subprocess.DEVNULL).returncode:
                raise NoBroker(f"{command}: failed") from None
