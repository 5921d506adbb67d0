"""Hello world: one sender, one queue, one receiver."""

import os
from contextlib import closing

import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import Queue

from tests.proxy import Proxy
from tests.scripts import Script, Scripts
from tools.broker import eventually

WAITING = " [*] Waiting for messages. To exit press CTRL+C"


def receiver(scripts: Scripts) -> Script:
    """Start a receiver and wait until it waits for messages."""
    started = scripts.start("hello_world/receive.py")
    started.expect(WAITING)
    return started


def test_a_message_waits_for_its_receiver(scripts: Scripts) -> None:
    """A message sent while no receiver runs waits in the queue; one started later prints it."""
    sender = scripts.run("hello_world/send.py")
    assert sender.out.all() == [" [x] Sent 'Hello World!'"]

    receiver = scripts.start("hello_world/receive.py")
    receiver.expect(" [x] Received 'Hello World!'")
    assert receiver.out.seen == [WAITING, " [x] Received 'Hello World!'"]


def test_either_script_may_start_first(scripts: Scripts, channel: BlockingChannel) -> None:
    """Both scripts declare the queue, and to declare it again changes nothing in it."""
    first = receiver(scripts)
    scripts.run("hello_world/send.py", "after the receiver")
    first.expect(" [x] Received 'after the receiver'")
    first.stop()

    def queue() -> Queue.DeclareOk:
        return channel.queue_declare("hello", durable=True).method

    eventually(lambda: queue().consumer_count == 0, "the broker knows that it is gone")

    scripts.run("hello_world/send.py", "one")
    scripts.run("hello_world/send.py", "two")
    assert queue().message_count == 2
    second = receiver(scripts)
    second.expect(" [x] Received 'two'")
    assert second.out.seen == [WAITING, " [x] Received 'one'", " [x] Received 'two'"]


def test_each_message_goes_to_exactly_one_receiver(scripts: Scripts) -> None:
    """Many senders feed the queue and many receivers read it; none prints another's message."""
    receivers = [receiver(scripts) for _ in range(3)]
    senders = [scripts.start("hello_world/send.py", f"message {i}") for i in range(9)]
    for sender in senders:
        assert sender.wait() == 0, str(sender)

    def received() -> list[str]:
        return [line for each in receivers for line in each.out.seen if line != WAITING]

    eventually(lambda: len(received()) >= 9, "nine messages are printed")
    for each in receivers:
        each.stop()
    assert sorted(received()) == [f" [x] Received 'message {i}'" for i in range(9)]
    assert all(len(each.out.seen) == 1 + 3 for each in receivers), "they are served in turn"


def test_amqp_url_alone_says_where_the_broker_is(scripts: Scripts) -> None:
    """Sender and receiver reach the broker under different addresses, through AMQP_URL alone."""
    with closing(Proxy(scripts.amqp_url)) as other_host:
        scripts.run("hello_world/send.py", "from afar", amqp_url=other_host.url)
        assert other_host.connections == 1
        receiver(scripts).expect(" [x] Received 'from afar'")
        assert other_host.connections == 1


def test_the_next_node_is_tried_when_one_is_down(scripts: Scripts) -> None:
    """AMQP_URL may hold several URLs, with commas between: the first that answers is taken.

    The first of these has no address, and nobody listens at that of the second.
    """
    with closing(Proxy(scripts.amqp_url)) as down:
        pass
    with (
        closing(Proxy(scripts.amqp_url)) as another,
        scripts.environment(RES_OPTIONS="timeout:1 attempts:1"),  # of looking up an address
    ):
        urls = f"amqp://no-such-host.invalid,{down.url}, {scripts.amqp_url}, {another.url}"
        scripts.run("hello_world/send.py", "to the third", amqp_url=urls)
        started = scripts.start("hello_world/receive.py", amqp_url=urls)
        started.expect(" [x] Received 'to the third'")
        assert another.connections == 0


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("", ""),
        ("你好", "你好"),
        (b"\xff\xfe is no text", r"\xff\xfe is no text"),
        ('it\'s -- "quoted" \\ and ünïcödé 🐇', 'it\'s -- "quoted" \\ and ünïcödé 🐇'),
    ],
    ids=["empty", "chinese", "no UTF-8", "punctuation"],
)
def test_a_message_is_bytes(
    scripts: Scripts, channel: BlockingChannel, message: str | bytes, shown: str
) -> None:
    """Whatever the bytes are, they arrive; what is no text is shown escaped."""
    scripts.run("hello_world/send.py", "--", message)
    assert channel.basic_get("hello", auto_ack=True)[2] == os.fsencode(message)
    started = receiver(scripts)
    scripts.run("hello_world/send.py", "--", message)
    started.expect(f" [x] Received '{shown}'")
    scripts.run("hello_world/send.py", "still here")
    started.expect(" [x] Received 'still here'")


def test_a_message_may_be_a_megabyte(scripts: Scripts) -> None:
    """A megabyte arrives whole. (An argument ends at 128 KiB on Linux, so it is several.)"""
    words = ["a" * 100_000] * 10
    started = receiver(scripts)
    scripts.run("hello_world/send.py", *words)
    started.expect(f" [x] Received '{' '.join(words)}'")


def test_every_terminal_can_show_every_message(scripts: Scripts) -> None:
    """A terminal that knows only ASCII shows Chinese text escaped, and the receiver lives."""
    with scripts.environment(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="POSIX"):
        started = receiver(scripts)
    scripts.run("hello_world/send.py", "你好")
    started.expect(r" [x] Received '\u4f60\u597d'")


def test_the_routing_key_of_the_default_exchange_is_the_queue(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """Through the nameless exchange a message reaches the queue that its routing key names."""
    scripts.run("hello_world/send.py", "by name")
    method, _properties, body = channel.basic_get("hello", auto_ack=True)
    assert method is not None
    assert (method.exchange, method.routing_key, body) == ("", "hello", b"by name")

    started = receiver(scripts)
    channel.queue_declare("another", durable=True)
    channel.basic_publish(exchange="", routing_key="another", body=b"not for hello")
    channel.basic_publish(exchange="", routing_key="hello", body=b"for hello")
    started.expect(" [x] Received 'for hello'")
    assert started.out.seen == [WAITING, " [x] Received 'for hello'"]
