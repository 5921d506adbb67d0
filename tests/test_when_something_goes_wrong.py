"""The README's index of errors: each of them is made to happen."""

from __future__ import annotations

import datetime
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pika
import pytest
import trustme
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection
from pika.spec import Connection

from tests.proxy import Proxy
from tests.scripts import SEND, Scripts, another_user, consumer_timeout, replaced
from tools import ROOT, environment
from tools.broker import Broker, eventually, free_port, virtual_host_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## When something goes wrong\n")[2].partition("\n## ")[0]
INDEX = re.findall(r"^\| `([^`]+)` \|", SECTION, re.MULTILINE)


@dataclass
class Situation:
    """What a reader who meets an error has: a broker, its URL, scripts, a channel to destroy."""

    broker: Broker
    url: str
    scripts: Scripts
    channel: BlockingChannel

    def told_by_send(self, url: str) -> None:
        """Start send.py, which fails, and raise what it tells."""
        raise RuntimeError(self.scripts.run(SEND, amqp_url=url, status=1).err.all())


def connect(url: str) -> None:
    BlockingConnection(pika.URLParameters(url)).close()


Cause = Callable[[Situation], object]
CAUSES: dict[str, Cause] = {}


def causes(text: str) -> Callable[[Cause], Cause]:
    """Say which line of the index a function makes happen."""

    def remember(cause: Cause) -> Cause:
        CAUSES[text] = cause
        return cause

    return remember


@causes("ModuleNotFoundError: No module named 'pika'")
def without_pika(_: Situation) -> None:
    command = [sys.executable, "-S", SEND]  # -S: nothing that was installed
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    raise RuntimeError(ended.stderr)


@causes("Connection refused")
def no_broker(s: Situation) -> None:
    s.told_by_send(replaced(s.url, port=free_port()))


@causes("No RabbitMQ accepts us")
def two_addresses(s: Situation) -> None:
    s.told_by_send(",".join(replaced(s.url, port=free_port()) for _ in range(2)))


@causes("AMQP_URL must look like")
def an_empty_address(s: Situation) -> None:
    s.told_by_send(f"{s.url},")


@causes("ACCESS_REFUSED - Login was refused")
def wrong_password(s: Situation) -> None:
    connect(replaced(s.url, user="guest:wrong"))


@causes("NOT_ALLOWED - vhost")
def wrong_virtual_host(s: Situation) -> None:
    connect(replaced(s.url, path="/nowhere"))


@causes("NOT_ALLOWED - access to vhost")
def no_permissions_at_all(s: Situation) -> None:
    with another_user(s.broker, s.url, "stranger") as url:
        s.broker.api("DELETE", f"permissions/{virtual_host_of(s.url)}/stranger")
        connect(url)


@causes("ACCESS_REFUSED - ")
def no_permission(s: Situation) -> None:
    with another_user(s.broker, s.url, "newcomer") as url:
        BlockingConnection(pika.URLParameters(url)).channel().queue_declare("hello", durable=True)


@causes("PRECONDITION_FAILED - inequivalent arg")
def other_settings(s: Situation) -> None:
    s.channel.queue_declare("hello", durable=True)
    s.channel.queue_declare("hello", durable=True, arguments={"x-max-length": 10})


@causes("PRECONDITION_FAILED - unknown delivery tag")
def acknowledged_twice(s: Situation) -> None:
    s.channel.queue_declare("hello", durable=True)
    s.channel.basic_publish("", "hello", b"")
    tag = eventually(lambda: s.channel.basic_get("hello")[0], "the message").delivery_tag
    s.channel.basic_ack(tag)
    s.channel.basic_ack(tag)
    s.channel.queue_declare("hello", passive=True)


@causes("PRECONDITION_FAILED - delivery acknowledgement")
def acknowledged_too_late(s: Situation) -> None:
    if s.broker.release >= (4, 3):
        pytest.skip("RabbitMQ 4.3 does not close the channel any more")
    with consumer_timeout(s.broker, 1000):
        channel = BlockingConnection(pika.URLParameters(s.url)).channel()  # it has the new timeout
        channel.queue_declare("hello", durable=True)
        channel.basic_publish("", "hello", b"")
        channel.basic_consume("hello", lambda *_: None)
        channel.start_consuming()


@causes("PRECONDITION_FAILED - user_id")
def a_false_sender(s: Situation) -> None:
    s.channel.confirm_delivery()
    s.channel.basic_publish("", "hello", b"", pika.BasicProperties(user_id="boss"))


@causes("NOT_FOUND - no queue")
def no_queue(s: Situation) -> None:
    s.channel.basic_consume("nowhere", lambda *_: None)


@causes("RESOURCE_LOCKED")
def somebody_elses(s: Situation) -> None:
    other = BlockingConnection(pika.URLParameters(s.url))
    other.channel().queue_declare("mine", exclusive=True)
    s.channel.queue_declare("mine", exclusive=True)


@causes("NOT_IMPLEMENTED")
def get_from_a_stream(s: Situation) -> None:
    s.channel.queue_declare("log", durable=True, arguments={"x-queue-type": "stream"})
    s.channel.basic_get("log")


@causes("consumer prefetch count is not set")
def stream_without_a_prefetch(s: Situation) -> None:
    s.channel.queue_declare("log", durable=True, arguments={"x-queue-type": "stream"})
    s.channel.basic_consume("log", lambda *_: None)


@causes("transient_nonexcl_queues")
def neither_durable_nor_exclusive(s: Situation) -> None:
    if s.broker.version.startswith("3."):
        pytest.skip("RabbitMQ 3.10 accepts such queues")
    s.channel.queue_declare("old")


def published_by_threads(url: str) -> str:
    """Publish on one connection from eight threads until it fails, and return their errors."""
    channel = BlockingConnection(pika.URLParameters(url)).channel()
    channel.confirm_delivery()
    errors: list[str] = []

    def publish() -> None:
        try:
            while not errors:
                channel.basic_publish("", "nowhere", b"")
        except BaseException as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=publish, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return " ".join(errors)


@causes("IndexError: pop from an empty deque")
def shared_by_threads(s: Situation) -> None:
    tries = (published_by_threads(s.url) for _ in range(20))  # some get another error
    found = next(errors for errors in tries if "IndexError" in errors)
    raise RuntimeError(found.replace("IndexError('", "IndexError: "))


@causes("UNEXPECTED_FRAME")
def a_frame_too_many(s: Situation) -> None:
    """What two processes or threads on one connection do to each other's frames."""
    header = pika.frame.Header(1, 3, pika.BasicProperties())
    impl: Any = s.channel.connection
    impl._impl._output_marshaled_frames([header.marshal()])
    s.channel.queue_declare("hello", durable=True)


@causes("StreamLostError")
def connection_cut(s: Situation) -> None:
    with closing(Proxy(s.url)) as proxy:
        channel = BlockingConnection(pika.URLParameters(proxy.url)).channel()
        proxy.cut()
        channel.queue_declare("hello", durable=True)


@causes("CONNECTION_FORCED")
def closed_by_an_administrator(s: Situation) -> None:
    name = eventually(
        lambda: [c for c in s.broker.api("GET", "connections") if c["vhost"] in s.url],
        "the broker shows the connection",
    )[0]["name"]
    s.broker.api("DELETE", f"connections/{name}")
    s.channel.connection.sleep(10)


@causes("IncompatibleProtocolError")
def not_amqp(s: Situation) -> None:
    def watch(index: int, _to_broker: bool) -> bool:
        if index == Connection.Start.INDEX:
            proxy.cut()
        return True

    with closing(Proxy(s.url, watch)) as proxy:
        connect(proxy.url)


@causes("ChannelWrongStateError")
def closed_channel(s: Situation) -> None:
    s.channel.close()
    s.channel.basic_publish("", "hello", b"")


@causes("NackError")
def full_queue(s: Situation) -> None:
    limit = {"x-max-length": 1, "x-overflow": "reject-publish"}
    s.channel.queue_declare("full", durable=True, arguments=limit)
    s.channel.confirm_delivery()
    for _ in range(3):
        s.channel.basic_publish("", "full", b"")


@causes("UnroutableError")
def nowhere(s: Situation) -> None:
    s.channel.confirm_delivery()
    s.channel.basic_publish("", "nowhere", b"", mandatory=True)


def with_certificate(
    s: Situation, trusted: bool = True, name: str = "127.0.0.2", **validity: Any
) -> None:
    """Connect with TLS to a server with a certificate of its own."""
    ours, stranger = trustme.CA(), trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.issue_cert(name, **validity).configure_cert(server)
    client = ssl.create_default_context()
    (ours if trusted else stranger).configure_trust(client)
    with closing(Proxy(s.url, tls=server)) as proxy:
        parameters = pika.URLParameters(proxy.url)
        parameters.ssl_options = pika.SSLOptions(client)
        BlockingConnection(parameters)


@causes("unable to get local issuer certificate")
def unknown_authority(s: Situation) -> None:
    with_certificate(s, trusted=False)


@causes("IP address mismatch")
def wrong_name(s: Situation) -> None:
    with_certificate(s, name="127.0.0.3")


@causes("certificate has expired")
def expired(s: Situation) -> None:
    with_certificate(s, not_after=datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc))


@causes("WRONG_VERSION_NUMBER")
def tls_to_the_plain_port(s: Situation) -> None:
    connect(s.url.replace("amqp://", "amqps://"))


@pytest.mark.parametrize("text", INDEX)
def test_each_error_of_the_index_happens_as_it_says(
    own_broker: Broker, scripts: Scripts, channel: BlockingChannel, text: str
) -> None:
    """What the README names as the cause of an error makes a reader see this text."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        CAUSES[text](Situation(own_broker, scripts.amqp_url, scripts, channel))
    assert text in repr(caught.value) + str(caught.value)


def test_the_index_is_complete() -> None:
    """Each error that a test here makes happen stands in the README, once."""
    assert sorted(INDEX) == sorted(CAUSES)
