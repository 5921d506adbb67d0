"""One broker for each process that runs tests, a virtual host for each test, and the report."""

from __future__ import annotations

import inspect
import os
import re
import signal
import textwrap
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from tests.scripts import Scripts
from tools.broker import Broker, Cluster, NoBroker, check, container_problem, start


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


def pytest_sessionstart(session: pytest.Session) -> None:
    """Say which broker is used, or that there is none, before the first test."""
    config = session.config
    if config.option.collectonly or hasattr(config, "workerinput"):  # of a process of pytest -n 2
        return
    try:
        config.get_terminal_writer().line(f"broker: {check(config.option.broker)}")
    except NoBroker as error:
        raise pytest.UsageError(str(error)) from None


# --- What is promised is what the tests are called ---


def in_words(name: str) -> str:
    """Return the words in the name of a test or a file, without those of its parameters."""
    words, bracket, parameters = name.partition("[")
    return words.removeprefix("test_").replace("_", " ") + (bracket and f" [{parameters}")


@pytest.hookimpl(wrapper=True)
def pytest_report_teststatus(report: pytest.TestReport) -> Generator[None, Any, Any]:
    """Show a line of words for each test, where pytest shows a letter."""
    category, letter, word = yield
    if letter:
        path, _, name = report.nodeid.partition("::")
        letter = f"\n{category:8}{in_words(Path(path).stem)}: {in_words(name)}"
    return category, letter, word


def pytest_collection_finish(session: pytest.Session) -> None:
    """List the tests by their names and docstrings, instead of pytest's own list."""
    if session.config.option.collectonly and not session.config.pluginmanager.hasplugin("terminal"):
        items = [item for item in session.items if isinstance(item, pytest.Function)]
        documented = (each for item in items for each in (item.module, item.function))
        for each in dict.fromkeys(documented):
            name = "" if inspect.ismodule(each) else f"  {in_words(each.__name__)}"
            print(
                name, textwrap.indent(inspect.getdoc(each) or "", "    " if name else ""), sep="\n"
            )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests have recorded with record_property, whichever process ran them."""
    reports = (report for reports in terminalreporter.stats.values() for report in reports)
    figures = [figure for report in reports for figure in getattr(report, "user_properties", [])]
    if figures:
        terminalreporter.section("figures")
        for name, value in dict.fromkeys(figures):
            terminalreporter.line(f"{name}: {value}")


# --- What tests need ---


@pytest.fixture(scope="session")
def broker(pytestconfig: pytest.Config) -> Iterator[Broker]:
    """The broker of this process, for all of its tests."""
    with closing(start(pytestconfig.option.broker)) as started:
        yield started


@pytest.fixture
def own_broker(broker: Broker) -> Broker:
    """The broker of this process, if it may be stopped and administered."""
    if not broker.owned:
        pytest.skip("needs a broker that it may stop: --broker container or local")
    return broker


@pytest.fixture(scope="session")
def containers(pytestconfig: pytest.Config) -> None:
    """Skip where there are none."""
    choice = pytestconfig.option.broker
    problem = container_problem() if choice in ("auto", "container") else f"--broker={choice}"
    if problem:
        pytest.skip(f"needs containers: {problem}")


@pytest.fixture(scope="session")
def cluster(containers: None) -> Iterator[Cluster]:  # noqa: ARG001
    """The three nodes of this process, for all of its tests with the marker `cluster`."""
    with closing(Cluster()) as started:
        started.start()
        yield started


@pytest.fixture
def amqp_url(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Iterator[str]:
    """The URL of a new virtual host, named after the test and its process."""
    cluster = request.node.get_closest_marker("cluster")
    broker: Broker = request.getfixturevalue("cluster" if cluster else "broker")
    record_property("broker", str(broker))
    name = re.sub(r"\W+", "-", request.node.name)[:100].strip("-")
    with broker.virtual_host(f"{name}-{os.getpid()}") as url:
        yield url
        if cluster:
            broker.start()  # the nodes that the test has killed


@pytest.fixture
def scripts(amqp_url: str) -> Iterator[Scripts]:
    """Scripts on the test's virtual host. Those that still run at its end are killed."""
    with closing(Scripts(amqp_url)) as opened:
        yield opened


@pytest.fixture
def channel(amqp_url: str) -> Iterator[BlockingChannel]:
    """A channel of the test's own, on the test's virtual host."""
    connection = pika.BlockingConnection(pika.URLParameters(amqp_url))
    yield connection.channel()
    if connection.is_open:
        connection.close()
