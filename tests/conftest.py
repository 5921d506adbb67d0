"""One broker for the whole run, and a virtual host of its own for each test."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from tests.scripts import Scripts
from tools.broker import Broker, Compose, Container, NoBroker, check, compose_problem, start

broker_key = pytest.StashKey[Broker]()
figures_key = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--broker",
        default="auto",
        metavar="auto|container|local|URL",
        help="where RabbitMQ comes from; auto is a container, or else the local rabbitmq-server",
    )


def pytest_configure() -> None:
    # A job in the background is started with Ctrl+C ignored, and what it starts inherits that.
    # SIGTERM ends a run in the same orderly way.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def in_parallel(config: pytest.Config) -> bool:
    """Say whether this process leads others (pytest -n 2), each with a broker of its own."""
    return config.pluginmanager.has_plugin("dsession")


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    if config.option.collectonly:
        return
    try:
        if in_parallel(config):
            check(config.option.broker)
        else:
            config.stash[broker_key] = start(config.option.broker)
    except NoBroker as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header(config: pytest.Config) -> str | None:
    if in_parallel(config):
        return f"broker: {config.option.broker}, one for each process; which, is said at the end"
    broker = config.stash.get(broker_key, None)
    return f"broker: {broker}" if broker else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand to the leading process what it prints at the end."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        said = [f"broker: {session.config.stash[broker_key]}"]
        output["figures"] = said + session.config.stash.get(figures_key, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a process has handed over."""
    figures = node.config.stash.setdefault(figures_key, [])
    figures += [f for f in getattr(node, "workeroutput", {}).get("figures", []) if f not in figures]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures = terminalreporter.config.stash.get(figures_key, [])
    if figures:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.line(figure)


def pytest_unconfigure(config: pytest.Config) -> None:
    broker = config.stash.get(broker_key, None)
    if broker:
        broker.close()


@pytest.fixture
def broker(pytestconfig: pytest.Config) -> Broker:
    """The broker of this run."""
    return pytestconfig.stash[broker_key]


@pytest.fixture
def own_broker(broker: Broker) -> Broker:
    """The broker of this run, if it may be stopped and administered."""
    if not broker.owned:
        pytest.skip("needs a broker that it may stop: --broker container or local")
    return broker


@pytest.fixture(scope="session")
def compose(pytestconfig: pytest.Config) -> Iterator[Compose]:
    """The RabbitMQ of docker-compose.yml, up and healthy, where this run's broker is a container.

    Nothing is left of it afterwards.
    """
    if not isinstance(pytestconfig.stash[broker_key], Container):
        pytest.skip("needs a Docker engine: --broker=container")
    if problem := compose_problem():
        wanted = pytestconfig.option.broker == "container"
        (pytest.fail if wanted else pytest.skip)(problem)
    composed = Compose()
    yield composed
    before = composed.left()
    composed.close()
    assert before
    assert not composed.left()


@pytest.fixture
def figures(pytestconfig: pytest.Config) -> list[str]:
    """What is printed, line by line, at the end of the run."""
    return pytestconfig.stash.setdefault(figures_key, [])


@pytest.fixture
def amqp_url(broker: Broker, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a new virtual host, named after the test and its process."""
    name = re.sub(r"\W+", "-", request.node.name)[:100].strip("-")
    with broker.virtual_host(f"{name}-{os.getpid()}") as url:
        yield url


@pytest.fixture
def scripts(amqp_url: str) -> Iterator[Scripts]:
    """Scripts on the test's virtual host; what still runs in them is killed at last."""
    opened = Scripts(amqp_url)
    yield opened
    opened.close()


@pytest.fixture
def channel(amqp_url: str) -> Iterator[BlockingChannel]:
    """A channel of the test's own, on the test's virtual host."""
    connection = pika.BlockingConnection(pika.URLParameters(amqp_url))
    yield connection.channel()
    if connection.is_open:
        connection.close()
