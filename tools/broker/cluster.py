"""Three RabbitMQ nodes in containers, which form a cluster: cluster/docker-compose.yml."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from typing import Any

import requests

from tools.broker.base import SYNC, Broker, NoBroker, free_port
from tools.broker.container import IMAGE, compose_command

NODES = ("rabbit1", "rabbit2", "rabbit3")


class Cluster(Broker):
    """A Compose project of its own on free ports, which is removed at its end.

    It is not running before `start`: the lesson starts it itself.
    """

    owned = True
    kind = version = f"a cluster of containers of {IMAGE}"

    def __init__(self) -> None:
        ports, pages = ({node: free_port() for node in NODES} for _ in range(2))
        self.settings = {  # the environment in which `docker compose` is about this project
            "RABBITMQ_IMAGE": IMAGE,
            "COMPOSE_PROJECT_NAME": f"tutorial-test-{ports['rabbit1']}",
            "COMPOSE_PROGRESS": "plain",
            "COMPOSE_ANSI": "never",
            **{f"{node.upper()}_PORT": str(port) for node, port in ports.items()},
            **{f"{node.upper()}_MANAGEMENT_PORT": str(port) for node, port in pages.items()},
        }
        self.urls = {node: f"amqp://guest:guest@127.0.0.1:{ports[node]}/%2F" for node in NODES}
        self.pages = [f"http://127.0.0.1:{pages[node]}" for node in NODES]
        super().__init__(",".join(self.urls.values()), self.pages[0])
        self.command = compose_command(self.settings, "cluster/docker-compose.yml")
        self.rabbitmqctl_command = [*self.command, "exec", "-T", "rabbit1", "rabbitmqctl"]

    def __str__(self) -> str:
        return self.kind

    def compose(self, *arguments: str) -> str:
        """Run docker compose and return what it prints. Raises NoBroker if it fails."""
        ended = subprocess.run([*self.command, *arguments], capture_output=True, text=True)
        if ended.returncode:
            raise NoBroker(f"docker compose {' '.join(arguments)}: {ended.stderr.strip()[-500:]}")
        return ended.stdout

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

    def start(self, *nodes: str) -> None:
        """Start these nodes, or all, and wait until they are in the cluster."""
        try:
            self.compose("up", "-d", "--wait", *nodes)
        except NoBroker:  # before RabbitMQ 4.2, a node may fail if another one starts meanwhile
            self.compose("up", "-d", "--wait", *nodes)

    def stop(self, *nodes: str) -> None:
        """Stop these nodes, or all, with SIGTERM."""
        self.compose("stop", *nodes)

    def kill(self, *nodes: str) -> None:
        """Kill these nodes, or all, with SIGKILL."""
        self.compose("kill", *nodes)

    def close(self) -> None:
        """Remove the containers and their data."""
        self.compose("down", "-v")
