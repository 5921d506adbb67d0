"""Routing: each receiver chooses. That several receivers may want the same severity, and that a log
which nobody wants is dropped, is tested by playing the lesson."""

from __future__ import annotations

import pytest
from pika.adapters.blocking_connection import BlockingChannel

from tests.scripts import (
    EMIT_DIRECT,
    EMIT_TOPIC,
    RECEIVE_DIRECT,
    RECEIVE_TOPIC,
    Scripts,
    consumer,
)

# What has a routing key is the same in lesson 5, whose routing keys are words.
each_pair = pytest.mark.parametrize(
    ("emitter", "receiver"), [(EMIT_DIRECT, RECEIVE_DIRECT), (EMIT_TOPIC, RECEIVE_TOPIC)]
)


def test_a_receiver_gets_the_severities_that_it_names(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """It gets these and no other, in the order in which they were sent, and each log once, even if
    its severity was named twice."""
    started = consumer(scripts, RECEIVE_DIRECT, "warning", "error", "warning")
    for severity in ("info", "error", "debug", "warning", "Error", "errors", "", "#", "*"):
        channel.basic_publish("direct_logs", severity, f"a line with {severity}".encode())
    scripts.run(EMIT_DIRECT, "error", "the last")
    started.expect(" [x] error:the last")
    assert started.out.seen == [
        " [x] error:a line with error",
        " [x] warning:a line with warning",
        " [x] error:the last",
    ]


@pytest.mark.parametrize("script", [EMIT_DIRECT, RECEIVE_DIRECT, EMIT_TOPIC, RECEIVE_TOPIC])
def test_what_is_no_routing_key_is_refused(scripts: Scripts, script: str) -> None:
    """A routing key is UTF-8 text of at most 255 bytes. The usage and one line say so."""
    too_long = scripts.run(script, "错" * 86, status=2)
    assert too_long.err.all()[-1].endswith(": a routing key has at most 255 bytes")
    no_text = scripts.run(script, b"caf\xe9", status=2)
    assert no_text.err.all()[-1].endswith(r": invalid routing_key value: 'caf\udce9'")


@each_pair
def test_a_routing_key_may_be_any_text(scripts: Scripts, emitter: str, receiver: str) -> None:
    """Also 85 Chinese characters, which are 255 bytes."""
    started = consumer(scripts, receiver, "错" * 85)
    scripts.run(emitter, "错" * 85)
    started.expect(f" [x] {'错' * 85}:Hello World!")


@each_pair
def test_a_log_is_one_line_whatever_it_contains(
    scripts: Scripts, emitter: str, receiver: str
) -> None:
    """Line ends and control characters are printed escaped, also those of a routing key."""
    started = consumer(scripts, receiver, "a\nb")
    sent = scripts.run(emitter, "a\nb", "one\n [x] error:forged\x1b").out.seen
    assert sent == [r" [x] Sent a\nb:one\n [x] error:forged\x1b"]
    started.expect(r" [x] a\nb:one\n [x] error:forged\x1b")
