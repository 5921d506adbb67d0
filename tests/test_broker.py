"""Where RabbitMQ comes from: --broker, what is said when there is none, and `make broker`."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import tools.broker.local
from tests.scripts import Script, Scripts
from tools import ROOT, environment
from tools.broker import (
    INSTALL,
    Broker,
    LocalNode,
    NoBroker,
    NoServer,
    check,
    container_problem,
    free_port,
    install,
)
from tools.broker.__main__ import speaks_amqp

Program = Callable[[str, str], None]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Writes a shell script. They are the only programs in the PATH, and no server is installed."""
    monkeypatch.setattr(tools.broker.local, "FOLDER", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))

    def write(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return write


@pytest.mark.parametrize(
    ("docker", "problem"),
    [
        ("exit 1", "No Docker engine answers this user"),
        ('[ "$1" != compose ]', "The docker command has no compose plugin"),
        ('[ "$1" != image ] && [ "$1" != pull ]', "The image .* is not here, and cannot be pulled"),
        ("exit 0", ""),
    ],
    ids=["no engine", "no compose", "no image", "all"],
)
def test_a_container_needs_an_engine_and_compose_and_the_image(
    program: Program, docker: str, problem: str
) -> None:
    """What is missing is named."""
    assert container_problem() == "There is no docker command"
    program("docker", docker)
    assert re.fullmatch(problem, container_problem())


def test_auto_is_a_container_or_else_a_local_node(program: Program) -> None:
    """Where there is neither, the message says why, and what to type."""
    hint = f"installed. On Debian or Ubuntu, this installs it:\n.*sudo {INSTALL}$"
    with pytest.raises(NoBroker, match=f"^There is no docker command, and no .*{hint}"):
        check("auto")
    with pytest.raises(NoBroker, match=f"^No rabbitmq-server is {hint}"):
        check("local")
    program("rabbitmq-server", "")
    assert check("auto") == f"{LocalNode.kind} (There is no docker command)"
    assert check("local") == LocalNode.kind
    with pytest.raises(NoBroker, match=r"^There is no docker command\. Without"):
        check("container")
    program("docker", "exit 0")
    assert check("auto") == check("container") == tools.broker.Container.kind


def test_root_gets_the_server_installed(
    program: Program, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only where nothing else gives a broker. A user who is not root gets the line to type."""
    here = os.environ["PATH"]
    program("apt-get", f'echo "$@" >&2; : >{here}/rabbitmq-server; /bin/chmod +x {here}/*')
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NoServer, match=f"sudo {INSTALL}"):
        install("auto")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(NoBroker):
        install("container")
    install("amqp://elsewhere")
    assert capfd.readouterr() == ("", "")
    install("auto")
    assert capfd.readouterr() == (
        "There is no docker command, and no rabbitmq-server is installed: installing it with "
        "apt-get\n",
        "-qq update\n-qq install -y --no-install-recommends rabbitmq-server\n",
    )
    install("auto")  # it is there now
    install("local")
    assert capfd.readouterr() == ("", "")


def pytest_run(choice: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run one test as a process, with --broker."""
    test = "tests/test_hello_world.py::test_a_message_is_bytes"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--broker={choice}", test]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=120
    )


def test_an_address_is_used_as_it_is_and_named(broker: Broker) -> None:
    """--broker with a URL runs the tests there. What was promised and where is shown."""
    ended = pytest_run(broker.amqp_url, RABBITMQ_MANAGEMENT_URL=broker.management_url)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "\npassed  hello world: a message is bytes\n" in ended.stdout
    assert f"\nbroker: RabbitMQ {broker.version}, at " in ended.stdout


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("rabbit", "A broker is auto, container, local, or an AMQP URL"),
        (f"amqp://guest:secret@localhost:{free_port()}", "The broker at localhost does not serve"),
    ],
    ids=["malformed", "nobody there"],
)
def test_without_a_broker_the_tests_fail_and_say_why(choice: str, says: str) -> None:
    """One message without a password; nothing is skipped."""
    ended = pytest_run(choice)
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    assert re.fullmatch(f"ERROR: {says}.*\n\n", ended.stderr)
    assert "secret" not in ended.stdout + ended.stderr
    assert "skipped" not in ended.stdout


def test_make_broker_keeps_one_until_it_is_interrupted(own_broker: Broker) -> None:
    """`make broker` tells a reader all there is to type, and leaves no process behind."""
    port = free_port()
    env = environment(
        COMPOSE_PROJECT_NAME=f"tutorial-test-{port}",
        RABBITMQ_PORT=str(port),
        RABBITMQ_MANAGEMENT_PORT=str(free_port()),
    )
    local = isinstance(own_broker, LocalNode)
    choice = "local" if local else "container"
    command = [sys.executable, "-m", "tools.broker", f"--broker={choice}"]
    url = f"amqp://guest:guest@localhost:{port}/%2F"
    kept = Script(command, env)
    with closing(Scripts(url)) as scripts:
        try:
            kept.expect(f"    export AMQP_URL={url}", timeout=60)
            scripts.run("hello_world/send.py")
            if local:
                kept.expect(re.compile("    alias rabbitmqctl=.*"))
                rabbitmqctl = f"{kept.out.seen[-1]}\nrabbitmqctl"
            else:
                rabbitmqctl = "docker compose exec rabbitmq rabbitmqctl"
            listed = subprocess.check_output(
                ["bash", "-O", "expand_aliases", "-c", f"{rabbitmqctl} -q list_queues"],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                text=True,
            )
            assert re.search(r"^hello\s+1$", listed, re.MULTILINE)
            another = Script(command, env)
            assert another.wait() == 0
            assert another.out.seen[0].startswith("A broker is already running")

            kept.stop()
            assert kept.process.returncode == 0
            assert "Traceback" not in "\n".join(kept.err.seen)
            assert not speaks_amqp(port)
            if local:
                its = dict(re.findall(r"(HOME|ERL_EPMD_PORT)=(\S+)", rabbitmqctl))
                assert not Path(its["HOME"]).exists()
                assert not speaks_amqp(int(its["ERL_EPMD_PORT"]))  # nobody listens there
        finally:
            kept.process.terminate()  # which ends its broker, too
            kept.wait(60)
            if not local:
                subprocess.run(["docker", "compose", "down", "-v"], cwd=ROOT, env=env, check=True)
