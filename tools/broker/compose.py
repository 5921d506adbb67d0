"""RabbitMQ in a container: the service of docker-compose.yml, and what each Compose project has."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import subprocess

from testcontainers.compose import DockerCompose

from tools import ROOT
from tools.broker.base import Broker, NoBroker, free_port

logging.getLogger("testcontainers").setLevel(logging.CRITICAL)  # it also raises what it logs

IMAGE = os.environ.get("RABBITMQ_IMAGE") or "rabbitmq:4.3-management"


def container_problem(image: str = IMAGE) -> str:
    """Say why no container of `image` can be started here, or "". Pulls a missing image."""

    def fails(*command: str) -> bool:
        return subprocess.run(["docker", *command], capture_output=True).returncode != 0

    if shutil.which("docker") is None:
        return "There is no docker command"
    if fails("ps"):
        return "No Docker engine answers this user"
    if fails("compose", "version"):
        return "The docker command has no compose plugin"
    if fails("image", "inspect", image):
        print(f"Pulling the image {image}", flush=True)
        if fails("pull", image):
            return f"The image {image} is not here, and cannot be pulled"
    return ""


def remains(project: str) -> list[str]:
    """Return the ids of a project's containers, volumes and networks: a text for each kind."""
    mine = f"label=com.docker.compose.project={project}"
    kinds = (["ps", "-a"], ["volume", "ls"], ["network", "ls"])
    commands = (["docker", *kind, "-q", "--filter", mine] for kind in kinds)
    return [subprocess.check_output(command, text=True) for command in commands]


class Compose(Broker):
    """A project of Docker Compose. If it is not the reader's own, it is removed at its end."""

    owned = True
    readers = False  # and so keeps its data
    files: tuple[str, ...] = ("docker-compose.yml",)
    service = "rabbitmq"  # the one in which rabbitmqctl is called

    def __init__(self, amqp_url: str, management_url: str, **settings: str) -> None:
        """Take its addresses, and values for the variables in its files."""
        super().__init__(amqp_url, management_url)
        # The environment in which `docker compose` is about this project.
        self.settings = {"RABBITMQ_IMAGE": IMAGE, **settings}
        if not self.readers:
            self.settings |= {
                "COMPOSE_PROJECT_NAME": f"tutorial-test-{secrets.token_hex(4)}",
                "COMPOSE_PROGRESS": "plain",
                "COMPOSE_ANSI": "never",
            }
        env = ["env", *(f"{name}={value}" for name, value in self.settings.items())]
        files = (f"--file={ROOT / file}" for file in self.files)
        self.command = [*env, "docker", "compose", *files]
        self.rabbitmqctl_command = [*self.command, "exec", "-T", self.service, "rabbitmqctl"]
        self._compose = DockerCompose(ROOT)
        self._compose.compose_command_property = self.command

    def compose(self, *arguments: str) -> str:
        """Run docker compose and return what it prints. Raises NoBroker if it fails."""
        ended = subprocess.run([*self.command, *arguments], capture_output=True, text=True)
        if ended.returncode:
            raise NoBroker(f"docker compose {' '.join(arguments)}: {ended.stderr.strip()[-500:]}")
        return ended.stdout

    def stop(self, *services: str) -> None:
        """Stop these services, or all, with SIGTERM."""
        self.compose("stop", *services)

    def kill(self, *services: str) -> None:
        """Kill these services, or all, with SIGKILL."""
        self.compose("kill", *services)

    def close(self) -> None:
        """Remove the containers and their data, or stop them if they are the reader's own."""
        self._compose.stop(down=not self.readers)


class Container(Compose):
    """A container of RABBITMQ_IMAGE, which runs as soon as this is made.

    With ports it is the reader's own. Without them it has free ones, and permits no more than the
    official image does.
    """

    kind = f"in a container of {IMAGE}"

    def __init__(self, port: int | None = None, management_port: int | None = None) -> None:
        self.readers = port is not None
        if not self.readers:
            self.files += ("tools/broker/strict.yml",)
        port, management_port = port or free_port(), management_port or free_port()
        super().__init__(
            f"amqp://guest:guest@127.0.0.1:{port}/%2F",
            f"http://127.0.0.1:{management_port}",
            RABBITMQ_PORT=str(port),
            RABBITMQ_MANAGEMENT_PORT=str(management_port),
        )
        self.start_or_close()

    def start(self) -> None:
        """Start the container, or make it, and wait until RabbitMQ is ready."""
        try:
            self._compose.start()
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode().strip().rpartition("\n")[2]
            raise NoBroker(f"docker compose cannot start RabbitMQ: {reason}") from None
        self.wait_until_ready()
