"""docker-compose.yml: `docker compose up -d --wait` gives a RabbitMQ to follow the lessons with."""

import json
import os
import secrets
import subprocess
from collections.abc import Iterator

import pytest
import requests

from tests.broker import IMAGE, ROOT, compose_problem, container_problem, free_port
from tests.terminal import Terminals, environment

pytestmark = pytest.mark.xdist_group("compose")  # in one process, with one start of it


class Compose:
    """The compose file as a project of its own, on free ports, whatever a file .env says."""

    def __init__(self) -> None:
        self.project = f"tutorial-test-{secrets.token_hex(4)}"
        port, management_port = free_port(), free_port()
        self.amqp_url = f"amqp://guest:guest@localhost:{port}/%2F"
        self.management_url = f"http://localhost:{management_port}"
        self.environment = environment(
            RABBITMQ_IMAGE=IMAGE,
            RABBITMQ_PORT=str(port),
            RABBITMQ_MANAGEMENT_PORT=str(management_port),
        )

    def run(self, *arguments: str) -> str:
        """Run docker compose and return what it prints; AssertionError if it fails."""
        options = ["--env-file", os.devnull, "--file", "docker-compose.yml", "-p", self.project]
        command = ["docker", "compose", *options, *arguments]
        ended = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def left(self) -> str:
        """Return the ids of this project's containers, volumes and networks."""
        mine = f"label=com.docker.compose.project={self.project}"
        kinds = (["ps", "-a"], ["volume", "ls"], ["network", "ls"])
        commands = (["docker", *kind, "-q", "--filter", mine] for kind in kinds)
        return "".join(subprocess.check_output(command, text=True) for command in commands)


@pytest.fixture(scope="module")
def compose(pytestconfig: pytest.Config) -> Iterator[Compose]:
    """The compose file's RabbitMQ, up and healthy. Nothing is left of it afterwards."""
    asked: str = pytestconfig.option.broker
    if asked not in ("auto", "container"):
        pytest.skip(f"no container is wanted: --broker={asked}")
    problem = container_problem() or compose_problem()
    if problem and asked == "container":
        pytest.fail(problem)
    if problem:
        pytest.skip(problem)
    compose = Compose()
    try:
        compose.run("up", "-d", "--wait")
        assert compose.left()
        yield compose
    finally:
        compose.run("down", "-v")
    assert not compose.left()


@pytest.fixture
def terminals(compose: Compose) -> Iterator[Terminals]:
    """Terminals whose scripts find the compose file's RabbitMQ."""
    opened = Terminals(compose.amqp_url)
    yield opened
    opened.close()


def test_compose_gives_a_broker_with_its_management_page(
    compose: Compose, terminals: Terminals
) -> None:
    """As soon as compose is done waiting, scripts and the management page work."""
    terminals.run("hello_world/send.py")
    terminals.start("hello_world/receive.py").expect(" [x] Received 'Hello World!'")
    page = requests.get(compose.management_url, timeout=10)
    assert "RabbitMQ" in page.text
    users = requests.get(
        f"{compose.management_url}/api/whoami", auth=("guest", "guest"), timeout=10
    )
    assert users.json()["name"] == "guest"
    assert "task_queue" not in compose.run("exec", "-T", "rabbitmq", "rabbitmqctl", "list_queues")


def test_compose_publishes_on_this_machine_only(compose: Compose) -> None:
    """AMQP and the management page are on 127.0.0.1, and nothing else is published."""
    container = compose.run("ps", "-q", "rabbitmq").strip()
    [state] = json.loads(subprocess.check_output(["docker", "inspect", container]))
    published = {port: to for port, to in state["NetworkSettings"]["Ports"].items() if to}
    assert published.keys() == {"5672/tcp", "15672/tcp"}
    assert {to["HostIp"] for bindings in published.values() for to in bindings} == {"127.0.0.1"}


def test_data_survive_when_the_container_is_created_anew(
    compose: Compose, terminals: Terminals
) -> None:
    """A persistent task in the durable queue is there after `docker compose down` and `up`."""
    terminals.run("work_queues/new_task.py", "Survivor")
    before = compose.run("ps", "-q", "rabbitmq")
    compose.run("down")
    compose.run("up", "-d", "--wait")
    assert compose.run("ps", "-q", "rabbitmq") != before
    terminals.start("work_queues/worker.py").expect(" [x] Received 'Survivor'")
