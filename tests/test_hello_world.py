"""Hello world: one sender, one queue, one receiver. That either script may start first, and that
each message goes to one receiver, is tested by playing the lesson."""

import os
from contextlib import closing

from pika.adapters.blocking_connection import BlockingChannel

from tests.proxy import Proxy
from tests.scripts import CONSUMERS, RECEIVE, SEND, Scripts, consumer, received, take


def test_amqp_url_alone_says_where_the_broker_is(scripts: Scripts) -> None:
    """Sender and receiver reach the broker under different addresses, through AMQP_URL alone."""
    with closing(Proxy(scripts.amqp_url)) as other_host:
        scripts.run(SEND, "from afar", amqp_url=other_host.url)
        assert other_host.connections == 1
        consumer(scripts, RECEIVE).expect(received("from afar"))
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
        scripts.run(SEND, "to the third", amqp_url=urls)
        started = scripts.start(RECEIVE, amqp_url=urls)
        started.expect(received("to the third"))
        assert another.connections == 0


SHOWN: dict[str | bytes, str] = {  # what both scripts print for a message
    "": "''",
    "你好 🐇": "'你好 🐇'",
    b"\xff\xfe is no text": r"'\udcff\udcfe is no text'",
    r"a \n of two characters": r"'a \\n of two characters'",
    'it\'s -- "quoted"': r"""'it\'s -- "quoted"'""",
    "one\n [x] Received 'forged'": r'''"one\n [x] Received 'forged'"''',
    "\x1b[2J\r\x9b\u202e": r"'\x1b[2J\r\x9b\u202e'",
}


def test_a_message_is_bytes(scripts: Scripts, channel: BlockingChannel) -> None:
    """Whatever the bytes are, they arrive. Each message is one line, and nothing in it reaches the
    terminal that could move its cursor or look like another line."""
    for message, shown in SHOWN.items():
        assert scripts.run(SEND, "--", message).out.seen == [f" [x] Sent {shown}"]
    bodies = [take(channel, "hello")[1] for _ in SHOWN]
    assert bodies == [os.fsencode(message) for message in SHOWN]
    started = consumer(scripts, RECEIVE)
    for body in [*bodies, b"\0"]:
        channel.basic_publish("", "hello", body)
    started.expect(r" [x] Received '\x00'")
    assert started.out.seen[1:-1] == [f" [x] Received {shown}" for shown in SHOWN.values()]


def test_a_message_may_be_a_megabyte(scripts: Scripts) -> None:
    """A megabyte arrives whole. (An argument ends at 128 KiB on Linux, so it is several.)"""
    words = ["a" * 100_000] * 10
    started = consumer(scripts, RECEIVE)
    scripts.run(SEND, *words)
    started.expect(received(" ".join(words)))


def test_every_terminal_can_show_every_message(scripts: Scripts) -> None:
    """A terminal that knows only ASCII shows Chinese text escaped, and the receiver lives."""
    with scripts.environment(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="POSIX"):
        started = consumer(scripts, RECEIVE)
    scripts.run(SEND, "你好")
    started.expect(r" [x] Received '\u4f60\u597d'")


def test_the_routing_key_of_the_default_exchange_is_the_queue(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """Through the nameless exchange a message reaches the queue that its routing key names."""
    started = consumer(scripts, RECEIVE)
    channel.queue_declare("another", durable=True)
    channel.basic_publish(exchange="", routing_key="another", body=b"not for hello")
    channel.basic_publish(exchange="", routing_key="hello", body=b"for hello")
    started.expect(received("for hello"))
    assert started.out.seen == [CONSUMERS[RECEIVE], received("for hello")]
    started.stop()
    scripts.run(SEND, "by name")
    method, _properties, body = channel.basic_get("hello", auto_ack=True)
    assert method is not None
    assert (method.exchange, method.routing_key, body) == ("", "hello", b"by name")
