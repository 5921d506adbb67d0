"""Routing: each receiver chooses."""

from __future__ import annotations

import pytest
from pika.adapters.blocking_connection import BlockingChannel

from tests.scripts import EMIT_DIRECT, RECEIVE_DIRECT, Scripts, consumer


def emit(scripts: Scripts, *arguments: str | bytes) -> str:
    """Send a log line, and return what the emitter prints."""
    (sent,) = scripts.run(EMIT_DIRECT, *arguments).out.all()
    return sent


def test_a_receiver_gets_the_severities_that_it_names(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """It gets these and no other, in the order in which they were sent."""
    started = consumer(scripts, RECEIVE_DIRECT, "warning", "error")
    for severity in ("info", "error", "debug", "warning", "Error", "errors", "", "#", "*"):
        channel.basic_publish("direct_logs", severity, f"a line with {severity}".encode())
    emit(scripts, "error", "the last")
    started.expect(" [x] error:the last")
    assert started.out.seen == [
        " [x] error:a line with error",
        " [x] warning:a line with warning",
        " [x] error:the last",
    ]


def test_one_queue_may_have_several_bindings(scripts: Scripts) -> None:
    """A log line comes once, even if its severity was named twice."""
    started = consumer(scripts, RECEIVE_DIRECT, "error", "info", "error")
    emit(scripts, "error", "once")
    emit(scripts, "info", "the last")
    started.expect(" [x] info:the last")
    assert started.out.seen == [" [x] error:once", " [x] info:the last"]


def test_several_receivers_may_want_the_same_severity(scripts: Scripts) -> None:
    """Each of them gets a copy."""
    both = [
        consumer(scripts, RECEIVE_DIRECT, "error"),
        consumer(scripts, RECEIVE_DIRECT, "info", "error"),
    ]
    emit(scripts, "error", "for both")
    for each in both:
        each.expect(" [x] error:for both")


def test_a_severity_that_nobody_wants_is_dropped(scripts: Scripts) -> None:
    """That is no error, whether somebody listens for other severities or nobody listens at all."""
    assert emit(scripts) == " [x] Sent info:Hello World!"
    started = consumer(scripts, RECEIVE_DIRECT, "error")
    assert emit(scripts, "info", "dropped,", "too") == " [x] Sent info:dropped, too"
    emit(scripts, "error", "kept")
    started.expect(" [x] error:kept")
    assert started.out.seen == [" [x] error:kept"]


def test_without_a_severity_a_receiver_prints_its_usage(scripts: Scripts) -> None:
    """It ends with status 2."""
    refused = scripts.run(RECEIVE_DIRECT, status=2)
    assert refused.err.all()[0].startswith("usage: receive_logs_direct.py ")


@pytest.mark.parametrize("script", [EMIT_DIRECT, RECEIVE_DIRECT])
def test_a_severity_that_is_no_routing_key_is_refused(scripts: Scripts, script: str) -> None:
    """A routing key is UTF-8 text of at most 255 bytes. The usage and one line say so."""
    too_long = scripts.run(script, "错" * 86, status=2)
    assert too_long.err.all()[-1].endswith("SEVERITY: a routing key has at most 255 bytes")
    no_text = scripts.run(script, b"caf\xe9", status=2)
    assert no_text.err.all()[-1].endswith(r"SEVERITY: invalid routing_key value: 'caf\udce9'")


def test_a_severity_may_be_any_text(scripts: Scripts) -> None:
    """Also 85 Chinese characters, which are 255 bytes."""
    started = consumer(scripts, RECEIVE_DIRECT, "错" * 85)
    emit(scripts, "错" * 85)
    started.expect(f" [x] {'错' * 85}:Hello World!")


def test_a_log_is_one_line_whatever_it_contains(scripts: Scripts) -> None:
    """Line ends and control characters are printed escaped, also those of a severity."""
    started = consumer(scripts, RECEIVE_DIRECT, "a\nb")
    assert emit(scripts, "a\nb", "one\n [x] error:forged\x1b") == (
        r" [x] Sent a\nb:one\n [x] error:forged\x1b"
    )
    started.expect(r" [x] a\nb:one\n [x] error:forged\x1b")
