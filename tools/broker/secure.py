"""RabbitMQ with TLS, in a container: security/docker-compose.yml."""

from __future__ import annotations

from pathlib import Path

from tools.broker.base import free_port
from tools.broker.container import IMAGE
from tools.broker.project import Project


class Secure(Project):
    """One node, on a free port. Its certificates are those of the lesson, or in a folder."""

    kind = version = f"a container of {IMAGE} with TLS"
    file = "security/docker-compose.yml"
    service = "rabbitmq"

    def __init__(self, certificates: Path | None = None) -> None:
        self.address = f"localhost:{free_port()}"
        settings = {"RABBITMQ_TLS_PORT": self.address.partition(":")[2]}
        if certificates:
            settings["CERTIFICATES"] = str(certificates)
        super().__init__(f"amqps://guest:guest@{self.address}", "", settings)
