"""RabbitMQ and the workers of lesson 11 in containers: service/docker-compose.yml."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tools import ROOT
from tools.broker.base import Broker, NoBroker, free_port
from tools.broker.container import IMAGE, container_problem

PYTHON_IMAGE = os.environ.get("PYTHON_IMAGE") or "python:3.13-slim"


class Service(Broker):
    """A Compose project of its own, which is removed at its end.

    It is not running before the lesson starts it. Nobody can connect to it from outside. Without
    the passwords that service/make_secrets.py writes, in `folder`, it does not start.
    """

    owned = True
    kind = version = f"lesson 11 in containers of {IMAGE} and {PYTHON_IMAGE}"

    def __init__(self, folder: Path = ROOT / "service") -> None:
        if problem := container_problem() or container_problem(PYTHON_IMAGE):
            raise NoBroker(problem)
        port = str(free_port())
        self.settings = {  # the environment in which `docker compose` is about this project
            "RABBITMQ_IMAGE": IMAGE,
            "PYTHON_IMAGE": PYTHON_IMAGE,
            "RABBITMQ_METRICS_PORT": port,
            "COMPOSE_PROJECT_NAME": f"tutorial-test-{port}",
            "COMPOSE_PROGRESS": "plain",
            "COMPOSE_ANSI": "never",
        }
        super().__init__("amqp://127.0.0.1", f"http://127.0.0.1:{port}")
        env = ["env", *(f"{name}={value}" for name, value in self.settings.items())]
        self.command = [*env, "docker", "compose", "--project-directory", str(folder)]
        self.rabbitmqctl_command = [*self.command, "exec", "-T", "rabbitmq", "rabbitmqctl"]

    def compose(self, *arguments: str) -> str:
        """Run docker compose and return what it prints. Raises NoBroker if it fails."""
        ended = subprocess.run([*self.command, *arguments], capture_output=True, text=True)
        if ended.returncode:
            raise NoBroker(f"docker compose {' '.join(arguments)}: {ended.stderr.strip()[-500:]}")
        return ended.stdout

    def close(self) -> None:
        """Remove the containers and their data."""
        self.compose("down", "-v")
