"""RabbitMQ in containers that a lesson starts itself: lessons 9, 11 and 12."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from tools import ROOT
from tools.broker.base import SYNC, NoBroker, free_port
from tools.broker.compose import IMAGE, Compose, container_problem

NODES = ("rabbit1", "rabbit2", "rabbit3")
PYTHON_IMAGE = os.environ.get("PYTHON_IMAGE") or "python:3.13-slim"


class Project(Compose):
    """It is not running before `start`: the lesson starts it itself."""

    def __str__(self) -> str:
        return self.kind

    def start(self, *services: str) -> None:
        """Start these services, or all, and wait until they are healthy."""
        try:
            self.compose("up", "-d", "--wait", *services)
        except NoBroker:  # before RabbitMQ 4.2, a node may fail if another one starts meanwhile
            self.compose("up", "-d", "--wait", *services)


class Cluster(Project):
    """Three nodes, which form a cluster."""

    kind = version = f"a cluster of containers of {IMAGE}"
    files = ("cluster/docker-compose.yml",)
    service = "rabbit1"

    def __init__(self) -> None:
        ports, pages = ({node: free_port() for node in NODES} for _ in range(2))
        self.urls = {node: f"amqp://guest:guest@127.0.0.1:{ports[node]}/%2F" for node in NODES}
        self.pages = [f"http://127.0.0.1:{pages[node]}" for node in NODES]
        settings = {f"{node.upper()}_PORT": str(port) for node, port in ports.items()}
        settings |= {f"{node.upper()}_MANAGEMENT_PORT": str(port) for node, port in pages.items()}
        super().__init__(",".join(self.urls.values()), self.pages[0], **settings)

    def api(self, method: str, path: str, json: object = None) -> Any:
        """Call the HTTP API of the first node that answers."""
        for page in self.pages:
            self.management_url = page
            with contextlib.suppress(requests.ConnectionError):
                return super().api(method, path, json)
        raise NoBroker("No node of the cluster answers")

    @contextlib.contextmanager
    def virtual_host(self, name: str, **settings: str) -> Iterator[str]:
        """Make a virtual host, yield its AMQP URLs, one for each node, and delete it."""
        with super().virtual_host(name, **settings):
            yield self.amqp_url.replace("%2F", name)

    def sync(self) -> None:
        """Write the declarations of queues to the disks of all nodes."""
        for node in NODES:
            self.compose("exec", "-T", node, "rabbitmqctl", "eval", SYNC)


class Secure(Project):
    """One node with TLS. Its certificates are those of the lesson, or in a folder."""

    kind = version = f"a container of {IMAGE} with TLS"
    files = ("security/docker-compose.yml",)

    def __init__(self, certificates: Path | None = None) -> None:
        port = str(free_port())
        self.address = f"localhost:{port}"
        folder = {"CERTIFICATES": str(certificates)} if certificates else {}
        super().__init__(
            f"amqps://guest:guest@{self.address}", "", RABBITMQ_TLS_PORT=port, **folder
        )


class Service(Project):
    """One node, to which nobody can connect from outside, and the workers of lesson 11.

    It starts only with the passwords that make_secrets.py writes in `folder`, that of the lesson or
    a copy of it.
    """

    kind = version = f"lesson 11 in containers of {IMAGE} and {PYTHON_IMAGE}"

    def __init__(self, folder: Path = ROOT / "service") -> None:
        if problem := container_problem() or container_problem(PYTHON_IMAGE):
            raise NoBroker(problem)
        self.files = (f"{folder}/docker-compose.yml",)
        port = str(free_port())
        settings = {"PYTHON_IMAGE": PYTHON_IMAGE, "RABBITMQ_METRICS_PORT": port}
        super().__init__(f"amqp://localhost:{port}", f"http://127.0.0.1:{port}", **settings)
