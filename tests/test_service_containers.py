"""In production: RabbitMQ and workers in containers, as service/docker-compose.yml has them.

The lesson plays a rolling restart, in which each task is done once, and none is redelivered.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests

from tools import ROOT
from tools.broker import NoBroker, Service, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the folder of the lesson, with passwords of its own."""
    copy = tmp_path_factory.mktemp("copy") / "service"
    shutil.copytree(ROOT / "service", copy, ignore=shutil.ignore_patterns("secrets"))
    subprocess.run([sys.executable, copy / "make_secrets.py"], check=True)
    return copy


@pytest.fixture(scope="module")
def service(containers: None, folder: Path) -> Iterator[Service]:  # noqa: ARG001
    """RabbitMQ and three workers."""
    with closing(Service(folder)) as started:
        started.compose("up", "-d", "--build", "--wait", "--scale", "worker=3")
        yield started


def send(service: Service, *arguments: str) -> str:
    """Send a task from a container, and return its id."""
    return service.compose("run", "--rm", "-T", "new_task", *arguments).split()[-1]


def done(service: Service) -> list[str]:
    """Return the id of each task that a worker has done, from the logs of all workers."""
    log = service.compose("logs", "--no-log-prefix", "worker")
    return re.findall(r" INFO (\S+) done in ", log)


def queue_sizes(service: Service) -> dict[str, str]:
    """Return how many tasks are in each queue, also in the hands of workers."""
    table = service.rabbitmqctl("-q", "list_queues", "name", "messages", "--no-table-headers")
    return dict(line.split() for line in table.splitlines())


def inspected(service: Service, name: str) -> list[dict[str, Any]]:
    """Return what Docker tells about the containers of a service, also of those that ended."""
    ids = service.compose("ps", "-a", "-q", name).split()
    found: list[dict[str, Any]] = json.loads(subprocess.check_output(["docker", "inspect", *ids]))
    return found


def test_a_worker_that_docker_stops_finishes_its_task_first(service: Service) -> None:
    """It is process 1 of its container, and ends with 0."""
    task = send(service, "--seconds", "4", "long")
    begins = f" {task} begins"
    eventually(lambda: begins in service.compose("logs", "worker"), "the task begins")
    service.compose("stop", "worker")
    assert done(service) == [task]
    statuses = [container["State"]["ExitCode"] for container in inspected(service, "worker")]
    assert statuses == [0, 0, 0]
    empty = {"tasks": "0", "tasks.retry": "0", "tasks.parked": "0"}
    eventually(lambda: queue_sizes(service) == empty, "the task is acknowledged")
    service.compose("up", "-d", "--wait", "--no-recreate", "--scale", "worker=3", "worker")


def test_no_root_and_no_password(service: Service, folder: Path) -> None:
    """The workers are not root and can write nowhere. No password is in the image, in what Docker
    tells about the containers, on a command line, in the environment or in a log."""
    texts = "".join((folder / "secrets" / name).read_text() for name in ("worker", "producer"))
    passwords = re.findall(":([^:@/]+)@", texts)
    assert len(passwords) == 2
    shown = json.dumps(inspected(service, "worker") + inspected(service, "rabbitmq"))
    image = ["docker", "image", "inspect", "rabbitmq-service-worker"]
    shown += subprocess.check_output(image, text=True)
    shown += subprocess.check_output(["docker", "history", "--no-trunc", image[-1]], text=True)
    shown += subprocess.check_output(["ps", "axeww"], text=True)
    shown += service.compose("logs")
    shown += service.compose("exec", "-T", "worker", "env")
    assert not [password for password in passwords if password in shown]
    files = subprocess.check_output(["docker", "run", "--rm", image[-1], "ls", "-a"], text=True)
    assert set(files.split()) == {".", "..", "worker.py", "new_task.py"}
    assert service.compose("exec", "-T", "worker", "id", "-u").strip() == "65534"
    with pytest.raises(NoBroker, match="Read-only file system"):
        service.compose("exec", "-T", "worker", "touch", "/app/new")


def test_data_and_changed_policies_survive_new_containers(service: Service) -> None:
    """Tasks and queues are on a volume. What was changed with rabbitmqctl is not undone by the
    definitions, which RabbitMQ loads when it starts."""
    service.compose("stop", "worker")
    survivor = send(service, "--seconds", "0", "survivor")
    policy = '{"delivery-limit": 1000000000, "max-length": 7}'
    service.rabbitmqctl(
        "set_policy", "--apply-to", "queues", "tasks.parked", "^tasks.parked$", policy
    )
    service.compose("down")
    service.compose("up", "-d", "--wait", "--scale", "worker=3")
    eventually(lambda: done(service) == [survivor], "it is done", timeout=60)
    assert '"max-length":7' in service.rabbitmqctl("-q", "list_policies")


def test_each_figure_in_the_alerts_is_one_of_rabbitmqs(service: Service) -> None:
    """RabbitMQ gives each figure that the rules in alerts.yml ask for, with the queue's name."""
    rules = (ROOT / "service/alerts.yml").read_text()
    names = set(re.findall(r"\brabbitmq_\w+", rules))
    assert len(names) == 5
    paths = re.findall(r"^#   (/metrics.*)$", rules, re.MULTILINE)

    def figures() -> str:
        urls = (service.management_url + path for path in paths)
        return "".join(requests.get(url, timeout=10).text for url in urls)

    three = re.compile(r'^rabbitmq_detailed_queue_consumers\{.*queue="tasks"\} 3$', re.MULTILINE)
    eventually(lambda: three.search(figures()), "RabbitMQ knows the three workers")
    text = figures()
    asked_for = [rf"{name}(\{{.*\}})?" for name in names]
    for queue in ("tasks", "tasks.parked"):
        assert f'queue="{queue}"' in rules
        asked_for.append(rf'rabbitmq_detailed_queue_messages_ready\{{.*queue="{queue}"\}}')
    for figure in asked_for:
        assert re.search(rf"^{figure} \d", text, re.MULTILINE), figure


def test_nobody_else_gets_in(service: Service) -> None:
    """There is no user guest, and AMQP is not published."""
    users = service.rabbitmqctl("-q", "list_users", "--no-table-headers").splitlines()
    assert sorted(users) == ["producer\t[]", "worker\t[]"]
    [container] = inspected(service, "rabbitmq")
    published = {port for port, to in container["NetworkSettings"]["Ports"].items() if to}
    assert published == {"15692/tcp"}
