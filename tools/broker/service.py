"""RabbitMQ and the workers of lesson 11 in containers: service/docker-compose.yml."""

from __future__ import annotations

import os
from pathlib import Path

from tools import ROOT
from tools.broker.base import NoBroker, free_port
from tools.broker.container import IMAGE, container_problem
from tools.broker.project import Project

PYTHON_IMAGE = os.environ.get("PYTHON_IMAGE") or "python:3.13-slim"


class Service(Project):
    """One node, to which nobody can connect from outside, and its workers.

    It starts only with the passwords that make_secrets.py writes in `folder`, that of the lesson or
    a copy of it.
    """

    kind = version = f"lesson 11 in containers of {IMAGE} and {PYTHON_IMAGE}"
    file = "service/docker-compose.yml"
    service = "rabbitmq"

    def __init__(self, folder: Path = ROOT / "service") -> None:
        if problem := container_problem() or container_problem(PYTHON_IMAGE):
            raise NoBroker(problem)
        port = str(free_port())
        settings = {"PYTHON_IMAGE": PYTHON_IMAGE, "RABBITMQ_METRICS_PORT": port}
        super().__init__(f"amqp://localhost:{port}", f"http://127.0.0.1:{port}", settings)
        self.command[-1] = f"--file={folder}/docker-compose.yml"
        self.rabbitmqctl_command = [*self.command, "exec", "-T", self.service, "rabbitmqctl"]
