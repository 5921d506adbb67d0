"""Where RabbitMQ comes from: --broker, and what is said when there is none; `make broker`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tools.broker
from tests.scripts import Script, Scripts
from tools import environment
from tools.broker import (
    INSTALL,
    ROOT,
    Broker,
    Container,
    NoBroker,
    NoServer,
    choose,
    container_problem,
    find_server,
    free_port,
    install,
    speaks_amqp,
)

NOWHERE = "unix:///nowhere/docker.sock"


def pytest_run(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run pytest as a process, on a machine with no rabbitmq-server in Debian's place for it."""
    hidden = (
        "import pathlib, sys, pytest, tools.broker\n"
        "tools.broker.SERVER = pathlib.Path('/nowhere')\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", hidden, "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
    )


def program(folder: Path, name: str, script: str = "exit 0") -> Path:
    """Write a shell script, and return where it is."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no rabbitmq-server, and no engine behind its docker command: its PATH."""
    path = program(tmp_path / "bin", "docker").parent
    monkeypatch.setattr(tools.broker, "SERVER", tmp_path / "nowhere")
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setenv("DOCKER_HOST", NOWHERE)
    return path


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        (
            "auto",
            "ERROR: No Docker engine answers, and no rabbitmq-server is installed. On Debian or "
            f"Ubuntu, this installs it:\n    sudo apt-get update && sudo {INSTALL}\n\n",
        ),
        (
            "local",
            "ERROR: No rabbitmq-server is installed. On Debian or Ubuntu, this installs it:\n"
            f"    sudo apt-get update && sudo {INSTALL}\n\n",
        ),
        (
            "container",
            "ERROR: No Docker engine answers. A broker that is no container: local, or an AMQP "
            "URL\n\n",
        ),
        ("rabbit", "ERROR: A broker is auto, container, local, or an AMQP URL\n\n"),
    ],
    ids=["auto", "local", "container", "malformed"],
)
def test_without_a_broker_the_tests_fail_and_say_why(bare: Path, choice: str, says: str) -> None:
    """One clear message, on a machine with neither an engine nor a server; nothing is skipped."""
    ended = pytest_run(f"--broker={choice}", "tests/test_hello_world.py", PATH=str(bare))
    assert (ended.returncode, ended.stderr) == (pytest.ExitCode.USAGE_ERROR, says)
    assert "passed" not in ended.stdout
    assert "skipped" not in ended.stdout


def test_an_address_is_used_as_it_is_and_named(broker: Broker) -> None:
    """--broker with a URL runs the tests there; the header names the broker and its version."""
    ended = pytest_run(
        f"--broker={broker.amqp_url}",
        "tests/test_hello_world.py",
        "-k",
        "waits_for_its_receiver",
        RABBITMQ_MANAGEMENT_URL=broker.management_url,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"\nbroker: RabbitMQ {broker.version}, at " in ended.stdout
    assert " 1 passed" in ended.stdout


def test_an_address_where_nothing_answers() -> None:
    """The message tells where the broker should be, and not its password."""
    url = f"amqp://guest:secret@localhost:{free_port()}/%2F"
    ended = pytest_run(f"--broker={url}", "tests/test_hello_world.py")
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    assert ended.stderr.startswith("ERROR: The broker at localhost does not serve AMQP")
    assert "secret" not in ended.stdout + ended.stderr


def test_auto_goes_on_to_the_local_server(bare: Path) -> None:
    """Where no engine answers, auto is the server in the PATH, and the reason is known."""
    server = program(bare, "rabbitmq-server")
    assert find_server() == server.resolve()
    assert choose("auto") == ("local", "No Docker engine answers")
    assert choose("local") == ("local", "")
    with pytest.raises(NoBroker, match="No Docker engine answers"):
        choose("container")


def test_an_image_that_cannot_be_had_is_no_container(broker: Broker) -> None:
    """An engine is of no use without the image."""
    if not isinstance(broker, Container):
        pytest.skip("needs a Docker engine: --broker=container")
    missing = f"localhost:{free_port()}/rabbitmq:none"
    assert container_problem(missing) == (f"The image {missing} is not here, and cannot be pulled")


@pytest.fixture
def apt_get(bare: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt-get that writes down how it is called, and the server that it installs."""
    calls = bare / "calls"
    server = bare / "rabbitmq-server"
    program(bare, "apt-get", f'echo "$@" >>{calls}; echo >{server}; /bin/chmod +x {server}')
    calls.touch()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return calls


def test_root_gets_the_server_installed(apt_get: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing else gives a broker, root's make commands install the package, and say so."""
    with pytest.raises(NoBroker):
        install("container")
    install("amqp://elsewhere")
    assert apt_get.read_text() == ""

    install("auto")
    said = "No Docker engine answers, and no rabbitmq-server is installed: installing it"
    assert capsys.readouterr().out.startswith(said)
    installed = "-qq update\n-qq install -y --no-install-recommends rabbitmq-server\n"
    assert apt_get.read_text() == installed

    install("auto")  # it is there now
    install("local")
    assert apt_get.read_text() == installed


def test_others_are_told_what_to_type(apt_get: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who is not root gets the line to type, and nothing is installed."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NoServer, match=f"sudo {INSTALL}"):
        install("auto")
    assert apt_get.read_text() == ""


@pytest.mark.usefixtures("own_broker")
def test_make_broker_keeps_one_until_it_is_interrupted(pytestconfig: pytest.Config) -> None:
    """`make broker` tells a reader all there is to type, and leaves no process behind."""
    choice: str = pytestconfig.option.broker
    try:
        chosen, _why = choose(choice, compose=True)
    except NoServer as error:
        pytest.skip(str(error))
    port = free_port()
    project = f"tutorial-test-{port}"
    env = environment(
        COMPOSE_PROJECT_NAME=project,
        RABBITMQ_PORT=str(port),
        RABBITMQ_MANAGEMENT_PORT=str(free_port()),
    )
    command = [sys.executable, "-m", "tools.broker", f"--broker={choice}"]
    url = f"amqp://guest:guest@localhost:{port}/%2F"
    kept = Script(command, env)
    scripts = Scripts(url)
    try:
        kept.expect(f"    export AMQP_URL={url}", timeout=60)
        kept.expect(re.compile("    alias rabbitmqctl=.*"))
        alias = kept.out.seen[-1].strip()
        scripts.run("hello_world/send.py")
        listed = subprocess.check_output(
            ["bash", "-O", "expand_aliases", "-c", f"{alias}\nrabbitmqctl -q list_queues"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        assert re.search(r"^hello\s+1$", listed, re.MULTILINE)

        another = Script(command, env)
        scripts.started.append(another)
        assert another.wait() == 0
        assert another.out.seen[0].startswith("A broker is there already")

        kept.stop()
        assert kept.process.returncode == 0
        assert "Traceback" not in "\n".join(kept.err.seen)
        assert not speaks_amqp(port)
        if chosen == "local":
            its = dict(re.findall(r"(HOME|ERL_EPMD_PORT)=(\S+)", alias))
            assert not Path(its["HOME"]).exists()
            assert not speaks_amqp(int(its["ERL_EPMD_PORT"]))  # nobody listens there
    finally:
        kept.process.terminate()  # which ends its broker, too
        kept.wait(60)
        scripts.close()
        if chosen == "container":
            subprocess.run(["docker", "compose", "down", "-v"], cwd=ROOT, env=env, check=True)
