"""Three RabbitMQ nodes in containers, which form a cluster: cluster/docker-compose.yml."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import requests

from tools.broker.base import SYNC, NoBroker, free_port
from tools.broker.container import IMAGE
from tools.broker.project import Project

NODES = ("rabbit1", "rabbit2", "rabbit3")


class Cluster(Project):
    """The nodes have free ports."""

    kind = version = f"a cluster of containers of {IMAGE}"
    file = "cluster/docker-compose.yml"
    service = "rabbit1"

    def __init__(self) -> None:
        ports, pages = ({node: free_port() for node in NODES} for _ in range(2))
        self.urls = {node: f"amqp://guest:guest@127.0.0.1:{ports[node]}/%2F" for node in NODES}
        self.pages = [f"http://127.0.0.1:{pages[node]}" for node in NODES]
        super().__init__(
            ",".join(self.urls.values()),
            self.pages[0],
            {f"{node.upper()}_PORT": str(port) for node, port in ports.items()}
            | {f"{node.upper()}_MANAGEMENT_PORT": str(port) for node, port in pages.items()},
        )

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
