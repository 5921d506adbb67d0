"""Topics: patterns of words. That patterns which overlap make no copies is tested by playing the
lesson, and what is no routing key, with that of lesson 4."""

from __future__ import annotations

from pika.adapters.blocking_connection import BlockingChannel

from tests.scripts import RECEIVE_TOPIC, Scripts, consumer
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
