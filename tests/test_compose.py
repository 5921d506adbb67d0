"""docker-compose.yml: `docker compose up -d --wait` gives a RabbitMQ to follow the lessons with."""

import json
import subprocess
from collections.abc import Iterator

import pytest
import requests

from tests.scripts import Scripts
from tools.broker import Compose


@pytest.fixture
def scripts(compose: Compose) -> Iterator[Scripts]:
    """Scripts whose scripts find the compose file's RabbitMQ."""
    opened = Scripts(compose.amqp_url)
    yield opened
    opened.close()


def test_compose_gives_a_broker_with_its_management_page(
    compose: Compose, scripts: Scripts
) -> None:
    """As soon as compose is done waiting, scripts and the management page work."""
    scripts.run("hello_world/send.py")
    scripts.start("hello_world/receive.py").expect(" [x] Received 'Hello World!'")
    page = requests.get(compose.management_url, timeout=10)
    assert "RabbitMQ" in page.text
    assert compose.api("GET", "whoami")["name"] == "guest"
    assert "hello" in compose.rabbitmqctl("list_queues", "name")


def test_compose_publishes_on_this_machine_only(compose: Compose) -> None:
    """AMQP and the management page are on 127.0.0.1, and nothing else is published."""
    container = compose.run("ps", "-q", "rabbitmq").strip()
    [state] = json.loads(subprocess.check_output(["docker", "inspect", container]))
    published = {port: to for port, to in state["NetworkSettings"]["Ports"].items() if to}
    assert published.keys() == {"5672/tcp", "15672/tcp"}
    assert {to["HostIp"] for bindings in published.values() for to in bindings} == {"127.0.0.1"}


def test_data_survive_when_the_container_is_created_anew(
    compose: Compose, scripts: Scripts
) -> None:
    """A persistent task in the durable queue is there after `docker compose down` and `up`."""
    scripts.run("work_queues/new_task.py", "Survivor")
    before = compose.run("ps", "-q", "rabbitmq")
    compose.run("down")
    compose.start()
    assert compose.run("ps", "-q", "rabbitmq") != before
    scripts.start("work_queues/worker.py").expect(" [x] Received 'Survivor'")
