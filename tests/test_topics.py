"""Topics: patterns of words."""

from __future__ import annotations

import re

import pytest
from pika.adapters.blocking_connection import BlockingChannel

from tests.scripts import EMIT_TOPIC, RECEIVE_TOPIC, Scripts, consumer
from tools import ROOT


def table() -> tuple[list[str], dict[str, list[bool]]]:
    """Return the routing keys of the lesson's table, and for each pattern which of them it fits."""
    lesson = (ROOT / "topics/README.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in lesson.splitlines()
        if line.startswith("|") and "---" not in line
    ]
    keys = ["" if key == "(empty)" else key for key in rows[0][1:]]
    return keys, {pattern: [cell == "yes" for cell in cells] for pattern, *cells in rows[1:]}


def test_a_pattern_fits_what_the_lesson_says(scripts: Scripts, channel: BlockingChannel) -> None:
    """`*` is exactly one word and `#` any number, at the start, in the middle and at the end.

    Each cell of the lesson's table is tried, with words that are missing and one too many.
    """
    keys, patterns = table()
    assert {"*", "#", "*.*", "kern.#.critical"} <= patterns.keys()
    receivers = {pattern: consumer(scripts, RECEIVE_TOPIC, pattern) for pattern in patterns}
    for key in keys:
        channel.basic_publish(exchange="topic_logs", routing_key=key, body=b"a line")
    for pattern, fits in patterns.items():
        # What fits its own pattern is the last that this receiver gets.
        last = pattern.replace("*", "w").replace("#", "w")
        channel.basic_publish(exchange="topic_logs", routing_key=last, body=b"the end")
        started = receivers[pattern]
        started.expect(f" [x] {last}:the end")
        expected = [f" [x] {key}:a line" for key, does in zip(keys, fits, strict=True) if does]
        assert [s for s in started.out.seen if s.endswith("a line")] == expected, pattern


def test_a_log_that_fits_several_patterns_comes_once(scripts: Scripts) -> None:
    """Patterns of one queue that overlap make no copies."""
    started = consumer(scripts, RECEIVE_TOPIC, "kern.*", "*.critical", "#")
    scripts.run(EMIT_TOPIC, "kern.critical", "once")
    scripts.run(EMIT_TOPIC, "a.b.c.d", "the end")
    started.expect(" [x] a.b.c.d:the end")
    assert started.out.seen == [" [x] kern.critical:once", " [x] a.b.c.d:the end"]


def test_the_emitter_has_a_routing_key_and_a_message_of_its_own(scripts: Scripts) -> None:
    """Without arguments they are anonymous.info and Hello World!"""
    started = consumer(scripts, RECEIVE_TOPIC, "anonymous.info")
    sent = scripts.run(EMIT_TOPIC).out.all()
    assert sent == [" [x] Sent anonymous.info:Hello World!"]
    started.expect(" [x] anonymous.info:Hello World!")


@pytest.mark.parametrize("script", [EMIT_TOPIC, RECEIVE_TOPIC])
def test_a_key_of_more_than_255_bytes_is_one_line(scripts: Scripts, script: str) -> None:
    """The usage and one line say what is wrong, without a traceback; 255 bytes are fine."""
    refused = scripts.run(script, "a" * 256, status=2)
    assert refused.err.all()[-1].endswith("_KEY: a routing key has at most 255 bytes")
    started = consumer(scripts, RECEIVE_TOPIC, "a" * 255)
    scripts.run(EMIT_TOPIC, "a" * 255)
    started.expect(re.compile(r" \[x\] a{255}:Hello World!"))


def test_without_a_pattern_a_receiver_prints_its_usage(scripts: Scripts) -> None:
    """It ends with status 2."""
    refused = scripts.run(RECEIVE_TOPIC, status=2)
    assert refused.err.all()[0].startswith("usage: receive_logs_topic.py ")


def test_a_log_is_one_line_whatever_it_contains(scripts: Scripts) -> None:
    """Line ends and control characters are printed escaped, also those of a routing key."""
    started = consumer(scripts, RECEIVE_TOPIC, "#")
    sent = scripts.run(EMIT_TOPIC, "a\nb", "one\n [x] forged\x1b").out.seen
    assert sent == [r" [x] Sent a\nb:one\n [x] forged\x1b"]
    started.expect(r" [x] a\nb:one\n [x] forged\x1b")
