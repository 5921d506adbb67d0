"""What a broker is: its address, its HTTP API, and what only its owner may do with it."""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pika
import requests

START_TIMEOUT = 60  # seconds; a node boots slowly on a slow machine
SYNC = "catch mnesia:sync_log(), [dets:sync(Table) || Table <- dets:all()]."


class NoBroker(Exception):  # noqa: N818
    """RabbitMQ cannot be used in the way that was chosen. The text says why, and what to do."""


def eventually(check: Callable[[], Any], what: str, timeout: float = 15) -> Any:
    """Call `check` again and again until it returns something true, and return that.

    An exception counts as false. Raises AssertionError with `what` after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = check()
        except Exception as error:
            last = error
        else:
            if last:
                return last
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {timeout} s; last seen: {last!r}")


def virtual_host_of(amqp_url: str) -> str:
    """Return the virtual host of an AMQP URL, quoted as it is in the URL."""
    return amqp_url.rpartition("/")[2]


def free_port() -> int:
    """Return a port of this machine that nobody listens on.

    The ports from 32768 are those of outgoing connections on Linux. A client that keeps trying to
    reach a stopped broker on one of them is connected to itself sooner or later.
    """
    while True:
        port = 20000 + secrets.randbelow(12768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Broker:
    """A RabbitMQ node at an address. A subclass starts one, and can also stop it."""

    kind: str
    version: str  # of RabbitMQ
    owned = False  # it was started here, so it may be stopped and administered
    rabbitmqctl_command: list[str]  # runs rabbitmqctl on the node; only for a broker that is owned

    def __init__(self, amqp_url: str, management_url: str) -> None:
        """Take the AMQP URL of the broker's default virtual host, and the URL of its HTTP API."""
        self.amqp_url = amqp_url
        self.management_url = management_url

    def __str__(self) -> str:
        return f"RabbitMQ {self.version}, {self.kind}"

    @property
    def release(self) -> tuple[int, ...]:
        """The first two numbers of the version, to compare: (4, 3) is less than (4, 10)."""
        return tuple(map(int, self.version.split(".")[:2]))

    def api(self, method: str, path: str, json: object = None) -> Any:
        """Call RabbitMQ's HTTP API. Returns the decoded answer; raises requests.HTTPError."""
        user = urlsplit(self.amqp_url)
        answer = requests.request(
            method,
            f"{self.management_url}/api/{path}",
            json=json,
            auth=(unquote(user.username or "guest"), unquote(user.password or "guest")),
            timeout=30,
        )
        answer.raise_for_status()
        return answer.json() if answer.content else None

    @contextlib.contextmanager
    def virtual_host(self, name: str, **settings: str) -> Iterator[str]:
        """Make a virtual host, yield its AMQP URL, and delete it with all that is in it."""
        name = quote(name, safe="")
        self.api("PUT", f"vhosts/{name}", settings)
        try:
            yield urlsplit(self.amqp_url)._replace(path=f"/{name}").geturl()
        finally:
            self.api("DELETE", f"vhosts/{name}")

    def answers(self) -> bool:
        """Return True if the broker serves AMQP and its HTTP API, or raise what they raise."""
        self.version = str(self.api("GET", "overview")["rabbitmq_version"])
        pika.BlockingConnection(pika.URLParameters(self.amqp_url)).close()
        return True

    def wait_until_ready(self) -> None:
        """Wait until the broker serves AMQP and its HTTP API. Raises NoBroker if it does not."""
        try:
            eventually(self.answers, f"RabbitMQ, {self.kind}, is ready", START_TIMEOUT)
        except AssertionError as error:
            raise NoBroker(str(error)) from error

    def rabbitmqctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on the node and return what it prints; CalledProcessError if it fails."""
        command = [*self.rabbitmqctl_command, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def sync(self) -> None:
        """Write the declarations of queues to disk. RabbitMQ itself does it half a second later."""
        self.rabbitmqctl("eval", SYNC)

    def start(self) -> None:
        """Start the node, on the data that it has, and wait until it is ready."""
        raise NotImplementedError

    def start_or_close(self) -> None:
        """Start the node for the first time. If it cannot, or is interrupted, nothing is left."""
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def stop(self) -> None:
        """Stop the node with SIGTERM."""
        raise NotImplementedError

    def kill(self) -> None:
        """Kill the node with SIGKILL."""
        raise NotImplementedError

    def close(self) -> None:
        """End and remove all that was started. A broker that was there before stays as it is."""
