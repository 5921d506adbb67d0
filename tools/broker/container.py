"""RabbitMQ in a container: the service of docker-compose.yml."""

from __future__ import annotations

import logging
import os
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


def compose_command(settings: dict[str, str], *files: str) -> list[str]:
    """Return the command that runs docker compose in this environment, with files from here."""
    env = ["env", *(f"{name}={value}" for name, value in settings.items())]
    return [*env, "docker", "compose", *(f"--file={ROOT}/{file}" for file in files)]


def remains(project: str) -> list[str]:
    """Return the ids of a project's containers, volumes and networks: a text for each kind."""
    mine = f"label=com.docker.compose.project={project}"
    kinds = (["ps", "-a"], ["volume", "ls"], ["network", "ls"])
    commands = (["docker", *kind, "-q", "--filter", mine] for kind in kinds)
    return [subprocess.check_output(command, text=True) for command in commands]


class Container(Broker):
    """A container of RABBITMQ_IMAGE, started by Docker Compose.

    Without ports it has free ones, permits no more than the official image does, and is a Compose
    project of its own, which is removed at its end. With ports it is the reader's own project: its
    container is stopped at its end, and keeps its data.
    """

    owned = True
    kind = f"in a container of {IMAGE}"

    def __init__(self, port: int | None = None, management_port: int | None = None) -> None:
        settings = {
            "RABBITMQ_IMAGE": IMAGE,
            "RABBITMQ_PORT": str(port or free_port()),
            "RABBITMQ_MANAGEMENT_PORT": str(management_port or free_port()),
        }
        files = ["docker-compose.yml"]
        if port is None:
            files.append("tools/broker/strict.yml")
            settings |= {
                "COMPOSE_PROJECT_NAME": f"tutorial-test-{settings['RABBITMQ_PORT']}",
                "COMPOSE_PROGRESS": "plain",
                "COMPOSE_ANSI": "never",
            }
        super().__init__(
            f"amqp://guest:guest@127.0.0.1:{settings['RABBITMQ_PORT']}/%2F",
            f"http://127.0.0.1:{settings['RABBITMQ_MANAGEMENT_PORT']}",
        )
        self.settings = settings  # the environment in which `docker compose` is about this project
        self.command = compose_command(settings, *files)
        self.rabbitmqctl_command = [*self.command, "exec", "-T", "rabbitmq", "rabbitmqctl"]
        self._compose = DockerCompose(ROOT, wait=False, keep_volumes=port is not None)
        self._compose.compose_command_property = self.command
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start the container, or make it, and wait until RabbitMQ is ready."""
        try:
            self._compose.start()
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode().strip().rpartition("\n")[2]
            raise NoBroker(f"docker compose cannot start RabbitMQ: {reason}") from None
        self.wait_until_ready()

    def stop(self) -> None:
        """Stop the container with SIGTERM."""
        self._compose.stop(down=False)

    def kill(self) -> None:
        """Kill the container with SIGKILL."""
        subprocess.run([*self.command, "kill"], check=True, capture_output=True)

    def close(self) -> None:
        """Remove the container and its data, or stop it if it is the reader's own."""
        self._compose.stop(down=not self._compose.keep_volumes)
