"""docker-compose.yml: `docker compose up -d --wait` gives a RabbitMQ to follow the lessons with."""

import json
import subprocess

import pytest
import requests

from tests.scripts import Scripts
from tools.broker import Broker, Container, remains


@pytest.fixture
def compose(broker: Broker) -> Container:
    """The broker of this process, where it is the service of docker-compose.yml."""
    if not isinstance(broker, Container):
        pytest.skip("needs a Docker engine: --broker=container")
    return broker


def docker_compose(compose: Container, *arguments: str) -> str:
    """Run docker compose and return what it prints."""
    return subprocess.check_output([*compose.command, *arguments], text=True)


def test_compose_gives_a_broker_that_is_ready(compose: Container, scripts: Scripts) -> None:
    """As soon as compose is done waiting, scripts and the management page work, on the data that
    was there before `docker compose down`."""
    scripts.run("work_queues/new_task.py", "Survivor")
    before = docker_compose(compose, "ps", "-q")
    docker_compose(compose, "down")
    docker_compose(compose, "up", "-d", "--wait")
    scripts.start("work_queues/worker.py").expect(" [x] Received 'Survivor'")
    assert "RabbitMQ" in requests.get(compose.management_url, timeout=10).text
    assert docker_compose(compose, "ps", "-q") != before


def test_compose_publishes_on_this_machine_only(compose: Container) -> None:
    """AMQP and the management page are on 127.0.0.1, and nothing else is published."""
    container = docker_compose(compose, "ps", "-q").strip()
    [state] = json.loads(subprocess.check_output(["docker", "inspect", container]))
    published = {port: to for port, to in state["NetworkSettings"]["Ports"].items() if to}
    assert published.keys() == {"5672/tcp", "15672/tcp"}
    assert {to["HostIp"] for bindings in published.values() for to in bindings} == {"127.0.0.1"}


@pytest.mark.usefixtures("compose")
def test_nothing_is_left_of_a_broker_that_is_closed() -> None:
    """Its container, its volume and its network are removed."""
    another = Container()
    project = another.settings["COMPOSE_PROJECT_NAME"]
    assert all(remains(project))
    another.close()
    assert not any(remains(project))
