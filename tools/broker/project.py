"""RabbitMQ in containers that a lesson starts itself: a Compose project of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from urllib.parse import urlsplit

from tools.broker.base import Broker, NoBroker
from tools.broker.container import IMAGE, compose_command


class Project(Broker):
    """A Compose project with ports of its own, which is removed at its end.

    It is not running before `start`: the lesson starts it itself.
    """

    owned = True
    file: str  # its docker-compose.yml
    service: str  # the one in which rabbitmqctl is called

    def __init__(self, amqp_url: str, management_url: str, ports: Mapping[str, str]) -> None:
        super().__init__(amqp_url, management_url)
        port = urlsplit(amqp_url.partition(",")[0]).port
        self.settings = {  # the environment in which `docker compose` is about this project
            "RABBITMQ_IMAGE": IMAGE,
            "COMPOSE_PROJECT_NAME": f"tutorial-test-{port}",
            "COMPOSE_PROGRESS": "plain",
            "COMPOSE_ANSI": "never",
            **ports,
        }
        self.command = compose_command(self.settings, self.file)
        self.rabbitmqctl_command = [*self.command, "exec", "-T", self.service, "rabbitmqctl"]

    def __str__(self) -> str:
        return self.kind

    def compose(self, *arguments: str) -> str:
        """Run docker compose and return what it prints. Raises NoBroker if it fails."""
        ended = subprocess.run([*self.command, *arguments], capture_output=True, text=True)
        if ended.returncode:
            raise NoBroker(f"docker compose {' '.join(arguments)}: {ended.stderr.strip()[-500:]}")
        return ended.stdout

    def start(self, *services: str) -> None:
        """Start these services, or all, and wait until they are healthy."""
        try:
            self.compose("up", "-d", "--wait", *services)
        except NoBroker:  # before RabbitMQ 4.2, a node may fail if another one starts meanwhile
            self.compose("up", "-d", "--wait", *services)

    def stop(self, *services: str) -> None:
        """Stop these services, or all, with SIGTERM."""
        self.compose("stop", *services)

    def kill(self, *services: str) -> None:
        """Kill these services, or all, with SIGKILL."""
        self.compose("kill", *services)

    def close(self) -> None:
        """Remove the containers and their data."""
        self.compose("down", "-v")
