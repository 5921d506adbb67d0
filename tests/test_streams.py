"""Streams: a log that each reader can read from any place, and read again.

The lesson plays what RabbitMQ refuses to readers. Here many lines are read and written at once, and
readers, connections and RabbitMQ end meanwhile.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from pika.adapters.blocking_connection import BlockingChannel

from tests.proxy import ACK, PUBLISH, Proxy
from tests.scripts import (
    LOGS_WAITING,
    LOST,
    NEW_TASKS,
    RECEIVE,
    Crew,
    Record,
    Script,
    Scripts,
    one_line,
    usage_error,
)
from tools import ROOT, TIMEOUT, environment
from tools.broker import Broker, Cluster, eventually, virtual_host_of

EMIT = "streams/emit_log_stream.py"
READ = "streams/read_logs.py"
STREAM = {"x-queue-type": "stream"}


def emitter(amqp_url: str) -> subprocess.Popen[str]:
    """Start a writer of the lines of its standard input."""
    command = [sys.executable, ROOT / EMIT, "-"]
    env = environment(amqp_url)
    start = partial(subprocess.Popen[str], command, env=env, text=True, bufsize=1)  # line by line
    return start(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def emit(scripts: Scripts, numbers: range) -> None:
    """Write lines with these numbers, each of them confirmed before the next one is sent."""
    lines = [f"line {n}" for n in numbers]
    out, err = emitter(scripts.amqp_url).communicate("".join(f"{line}\n" for line in lines))
    assert (err, out.splitlines()) == ("", [f" [x] Sent {line!r}" for line in lines])


def read(scripts: Scripts, place: str | int = "first", *options: str) -> list[str]:
    """Return what a reader prints that starts at this place and ends at the end of the stream."""
    ended = scripts.run(READ, "--from", str(place), "--until-end", *options)
    assert ended.err.seen == []
    return ended.out.seen


def reader(scripts: Scripts, *options: str, amqp_url: str | None = None) -> Script:
    """Start a reader, and wait until it waits for lines."""
    started = scripts.start(READ, *options, amqp_url=amqp_url)
    started.expect_error(LOGS_WAITING)
    return started


def shown(first: int, last: int) -> list[str]:
    """Return what is printed for lines whose text is `line` and their offset."""
    return [f" [x] {n}: line {n}" for n in range(first, last + 1)]


def fill(channel: BlockingChannel, first: int, last: int) -> None:
    """Write such lines as fast as it goes."""
    channel.queue_declare("log_stream", durable=True, arguments=STREAM)
    for n in range(first, last + 1):
        channel.basic_publish("", "log_stream", b"line %d" % n)
    channel.queue_declare("log_stream", passive=True)


def offset_of(line: str) -> int:
    """Return the offset in a line that a reader has printed."""
    return int(line.removeprefix(" [x] ").partition(": ")[0])


# --- Where a reader starts ---


def test_a_reader_starts_where_it_asks(scripts: Scripts) -> None:
    """At the first line, at the last, at an offset, at a time, at what was written within some
    time. It gets each line from there on, in order. With nothing there to read, it ends."""

    def check(expected: dict[str, list[str]]) -> None:
        """Readers that start at these places all at once print these lines, and end."""
        command = [READ, "--until-end", "--from"]
        for place, started in [(p, scripts.start(*command, p)) for p in expected]:
            assert started.wait() == 0
            assert (place, started.out.seen) == (place, expected[place])
            assert started.err.seen == []

    check({"first": []})  # one makes the stream: RabbitMQ 4.0 is not ready for several at once
    check({place: [] for place in ("last", "5", "1h")})
    emit(scripts, range(5))
    between = datetime.now().astimezone().replace(microsecond=0) + timedelta(seconds=1)
    eventually(lambda: datetime.now().astimezone() > between, "the next second")
    emit(scripts, range(5, 8))
    expected = dict.fromkeys(("first", "0", "1h"), shown(0, 7))
    expected |= {"last": shown(7, 7), "3": shown(3, 7)}
    local, tomorrow = between.replace(tzinfo=None), between + timedelta(days=1)
    expected |= dict.fromkeys((between.isoformat(), local.isoformat()), shown(5, 7))
    check(expected | {place: [] for place in (tomorrow.isoformat(), "next", "8")})


def test_until_end_means_what_was_there_at_the_start(scripts: Scripts) -> None:
    """A reader ends also while lines are written without a pause, faster than it reads."""
    emit(scripts, range(3))
    slow = scripts.start(READ, "--from", "first", "--until-end", "--pause", "0.5")
    slow.expect(" [x] 0: line 0")
    emit(scripts, range(3, 5))
    assert slow.wait() == 0
    assert slow.out.seen == shown(0, 2)


def test_a_place_that_is_none_is_refused(scripts: Scripts) -> None:
    """The usage is shown, and the status is 2."""
    places = ["0x", "-1", "1.5", "yesterday", "0001-01-01", "9999-12-31", str(2**63), ""]
    for place, started in [(p, scripts.start(READ, f"--from={p}")) for p in places]:
        assert f"argument --from: invalid place value: {place!r}" in usage_error(started)


def test_a_line_is_one_line(scripts: Scripts) -> None:
    """Whatever is in it: control characters and bytes that are no text are escaped."""
    scripts.run(EMIT, b"caf\xe9", "\x1b[31m", "a\nb", "你好")
    assert read(scripts) == [r" [x] 0: caf\udce9 \x1b[31m a\nb 你好"]


# --- Readers do nothing to the stream, nor to each other ---


def test_reading_takes_nothing_away(scripts: Scripts, channel: BlockingChannel) -> None:
    """Ten readers at ten places each get what they ask for, and so does one that comes later. One
    that is stopped in the middle holds up nobody."""
    fill(channel, 0, 4999)
    stuck = scripts.start(READ, "--from", "first", "--prefetch", "1", "--pause", "100")
    stuck.expect(" [x] 0: line 0")
    command = [READ, "--until-end", "--from"]
    for place, each in [(n, scripts.start(*command, str(n))) for n in range(0, 5000, 500)]:
        assert each.wait() == 0
        assert each.out.seen == shown(place, 4999)
    assert read(scripts) == shown(0, 4999)
    assert stuck.out.seen == shown(0, 0)


# --- Readers that are killed, cut off, or outlive RabbitMQ ---


def test_a_reader_with_a_name_goes_on_where_it_was(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path
) -> None:
    """It goes on after the last line that it has printed, also after kill -9, as often as you like:
    no line is skipped, and each kill repeats one line at most."""
    rng = random.Random(18)
    fill(channel, 0, 9999)
    name = str(tmp_path / "anna")
    printed: list[int] = []
    repeated = 0
    while not printed or printed[-1] < 9999:
        script = scripts.start(READ, "--from", "first", "--name", name, "--until-end")
        enough = rng.randrange(1, 2500)
        script.out.wait_for(lambda lines, enough=enough: len(lines) >= enough, timeout=30)  # type: ignore[misc]
        script.kill()
        offsets = [offset_of(line) for line in script.out.seen]
        begin = offsets[0] if offsets else len(printed)
        assert offsets == list(range(begin, begin + len(offsets)))
        assert len(printed) - 1 <= begin <= len(printed)
        repeated += len(printed) - begin
        printed += offsets[len(printed) - begin :]
    assert repeated <= 20
    assert read(scripts, "first", "--name", name) == []
    emit(scripts, range(10000, 10001))
    assert read(scripts, "first", "--name", name) == shown(10000, 10000)


def test_a_name_that_has_read_nothing_yet_misses_nothing(scripts: Scripts, tmp_path: Path) -> None:
    """A reader with a name that was at the end, and was killed there, gets what came meanwhile."""
    emit(scripts, range(1))
    name = str(tmp_path / "anna")
    reader(scripts, "--name", name).kill()
    emit(scripts, range(1, 2))
    assert read(scripts, "next", "--name", name) == shown(1, 1)


def test_a_file_with_something_else_is_refused(scripts: Scripts, tmp_path: Path) -> None:
    """It is not read as an offset, and stays as it is. A folder that is not there is one line."""
    (tmp_path / "anna.offset").write_text("dear diary")
    refused = scripts.start(READ, "--name", str(tmp_path / "anna"))
    assert "argument --name: invalid" in usage_error(refused)
    assert (tmp_path / "anna.offset").read_text() == "dear diary"
    line = one_line(scripts.start(READ, "--name", str(tmp_path / "no" / "anna")))
    assert "No such file or directory" in line


def test_a_reader_that_loses_its_connection_misses_nothing(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """Cut off in the middle of many lines, or before it has got any, it goes on at the next line:
    none is missing, none comes twice."""
    channel.queue_declare("log_stream", durable=True, arguments=STREAM)
    with closing(Proxy(scripts.amqp_url)) as proxy:
        started = reader(scripts, amqp_url=proxy.url)
        for part in range(4):
            proxy.cut()
            fill(channel, part * 5000, part * 5000 + 4999)
            enough = part * 5000 + 1000
            assert started.out.wait_for(lambda lines, enough=enough: len(lines) > enough, 30)  # type: ignore[misc]
        started.expect(" [x] 19999: line 19999")
    assert started.out.seen == shown(0, 19999)
    assert all(LOST.fullmatch(line) for line in started.err.seen if line != LOGS_WAITING)


def test_a_reader_outlives_rabbitmq(own_broker: Broker, scripts: Scripts, tmp_path: Path) -> None:
    """RabbitMQ is killed and starts again: what was confirmed is there, and readers go on, those
    with a name and those without, those that have read and those that have not. Without --from, a
    reader gets what is written from its start on."""
    emit(scripts, range(100))
    name = str(tmp_path / "anna")
    assert read(scripts, 0, "--name", name) == shown(0, 99)
    readers = [reader(scripts, "--from", "first"), reader(scripts)]
    readers[0].expect(" [x] 99: line 99")
    own_broker.sync()
    own_broker.kill()
    own_broker.start()

    def emitted() -> bool:  # for a moment, RabbitMQ 3.10 says that the stream is not there
        return scripts.start(EMIT, "line 100").wait() == 0

    eventually(emitted, "the stream is there", 30)
    for each in readers:
        each.expect(" [x] 100: line 100", timeout=30)
    assert readers[0].out.seen == shown(0, 100)
    assert readers[1].out.seen == shown(100, 100)
    assert read(scripts, 0, "--name", name) == shown(100, 100)


# --- Confirms and acknowledgements ---


def test_a_line_counts_as_sent_when_it_is_confirmed(scripts: Scripts) -> None:
    """While its confirm has not come, nothing is printed, and no other line is sent. If the
    connection is lost then, this is an error."""
    with closing(Proxy(scripts.amqp_url, lambda *_: proxy.to_client[ACK] < 3)) as proxy:
        emitting = emitter(proxy.url)
        assert emitting.stdin
        emitting.stdin.write("one\ntwo\nthree\nfour\n")
        eventually(lambda: proxy.to_client[ACK] == 3, "RabbitMQ has confirmed three lines")
        proxy.cut()
        out, err = emitting.communicate(timeout=TIMEOUT)
        assert emitting.returncode == 1
        assert out.splitlines() == [" [x] Sent 'one'", " [x] Sent 'two'"]
        assert re.fullmatch(r" \[!\] .+\n", err)
        assert proxy.to_broker[PUBLISH] == 3


def test_an_emitter_that_waits_for_input_keeps_its_connection(scripts: Scripts) -> None:
    """pika sends heartbeats meanwhile, and a line is sent when it comes."""
    with closing(Proxy(scripts.amqp_url)) as proxy:
        emitting = emitter(f"{proxy.url}?heartbeat=2")
        assert emitting.stdin
        assert emitting.stdout
        for line in ("one", "two"):
            emitting.stdin.write(f"{line}\n")
            assert emitting.stdout.readline() == f" [x] Sent '{line}'\n"
            enough = proxy.to_broker[0] + 2  # what is no method is a heartbeat here
            eventually(lambda enough=enough: proxy.to_broker[0] >= enough, "two heartbeats")  # type: ignore[misc]
        assert emitting.communicate(timeout=TIMEOUT) == ("", "")
        assert emitting.returncode == 0


def test_acknowledgements_are_joint_and_none_waits_long(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """Many lines are acknowledged at once; a lone one within about a second, because RabbitMQ
    before 4.3 closes the channel of a consumer that leaves one unacknowledged for half an hour."""
    with closing(Proxy(scripts.amqp_url)) as proxy:
        started = reader(scripts, amqp_url=proxy.url)
        emit(scripts, range(1))
        eventually(lambda: proxy.to_broker[ACK] == 1, "the line is acknowledged")
        fill(channel, 1, 5000)
        started.expect(" [x] 5000: line 5000")
        assert proxy.to_broker[ACK] < 100
        assert started.err.seen == [LOGS_WAITING]


# --- Retention ---


def test_retention_removes_the_oldest_lines_and_nothing_else(
    broker: Broker, scripts: Scripts, amqp_url: str
) -> None:
    """What is left is the end of the stream, without a gap. A reader that asks for what is gone
    starts at the first line that is there."""
    small = {"max-length-bytes": 20_000, "stream-max-segment-size-bytes": 5_000}
    policy = {"pattern": "^log_stream$", "definition": small}
    broker.api("PUT", f"policies/{virtual_host_of(amqp_url)}/small", policy)
    emit(scripts, range(600))
    eventually(lambda: len(read(scripts)) < 600, "the first lines are removed")
    lines = read(scripts)
    texts = [line.partition(": ")[2] for line in lines]
    assert texts == [f"line {n}" for n in range(600 - len(lines), 600)]
    offsets = [offset_of(line) for line in lines]
    assert all(one < following for one, following in pairwise(offsets))
    assert read(scripts, 0) == lines
    assert read(scripts, offsets[10]) == lines[10:]


# --- Endurance, a cluster, and speed ---


def copy_of_new_tasks(folder: Path, queue: str, arguments: object = None) -> str:
    """Make a copy of new_tasks.py that fills another queue: fast, and no line is lost."""
    script = (ROOT / NEW_TASKS).read_text().replace('"task_queue"', f'"{queue}"')
    path = folder / f"{queue}.py"
    path.write_text(script.replace("durable=True", f"durable=True, arguments={arguments}"))
    return str(path)


def start_to_fill(scripts: Scripts, folder: Path, count: int) -> Script:
    """Fill the stream with so many lines."""
    lines = folder / "lines"
    lines.write_text("".join(f"line {n}\n" for n in range(count)))
    return scripts.start(copy_of_new_tasks(folder, "log_stream", STREAM), str(lines))


class Reading:
    """A reader with a name that is killed again and again, and all that it prints."""

    def __init__(self, scripts: Scripts, name: Path) -> None:
        self.crew = Crew(scripts, 1, READ, "--from", "first", "--name", str(name))
        self.texts: dict[int, str] = {}  # by offset, as they came for the first time
        self.repeated = 0

    def read(self, count: int, act: Callable[[int], None]) -> int:
        """Read so many different lines, and act with the number of those that have come. All come,
        in the order of their offsets. Return how many lines the stream has twice."""
        seen: set[str] = set()
        for _, line in self.crew.read():
            if line.startswith(" [x] "):  # what is printed on standard error comes here, too
                offset, text = offset_of(line), line.partition(": ")[2]
                self.repeated += offset in self.texts
                assert self.texts.setdefault(offset, text) == text
                if text not in seen:
                    seen.add(text)
                    act(len(seen))
                if len(seen) == count:
                    break
        assert list(self.texts) == sorted(self.texts)
        missing = {f"line {n}" for n in range(count)} - seen
        assert not missing, f"{len(missing)} lines did not come; {self.crew.everyone[-1]}"
        assert set(self.crew.complaints()) == {LOGS_WAITING}
        return len(self.texts) - count


@pytest.mark.endurance
@pytest.mark.timeout(400)
def test_a_stream_under_fire(
    own_broker: Broker, scripts: Scripts, tmp_path: Path, record_property: Record
) -> None:
    """RabbitMQ is stopped and killed while many lines are written and read, and a reader with a
    name is killed again and again. It skips none of them. A kill repeats one line at most."""
    count = 100_000
    rng = random.Random(18)
    kills = set(rng.sample(range(1, count), 30))
    outages = {2000, *rng.sample(range(10_000, count), 3)}  # at the first, much is to be written
    scripts.run(READ, "--until-end")  # declares the stream
    own_broker.sync()
    writer = start_to_fill(scripts, tmp_path, count)
    reading = Reading(scripts, tmp_path / "anna")

    def act(seen: int) -> None:
        if seen in outages:
            own_broker.stop() if len(outages) % 2 else own_broker.kill()
            outages.remove(seen)
            own_broker.start()
        if seen in kills:
            reading.crew.kill_one(rng)

    doubles = reading.read(count, act)
    assert writer.wait(60) == 0, str(writer)
    record_property(
        "a stream under fire",
        f"{count} lines, none skipped; {doubles} twice in the stream; {reading.repeated} repeated "
        f"by {reading.crew.killed} kills of the reader; RabbitMQ ended 4 times",
    )
    assert not outages
    assert reading.crew.killed == 30
    assert reading.repeated <= 30


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_stream_outlives_a_node(
    cluster: Cluster, scripts: Scripts, tmp_path: Path, record_property: Record
) -> None:
    """The node to which all are connected is killed while lines are written and read, and so is
    another one after its return. No confirmed line is lost, and the reader skips none."""
    count = 60_000
    rng = random.Random(18)
    scripts.run(EMIT, "line 0")
    cluster.sync()
    writer = start_to_fill(scripts, tmp_path, count)
    reading = Reading(scripts, tmp_path / "anna")
    nodes = {10_000: "rabbit1", 35_000: "rabbit2"}

    def act(seen: int) -> None:
        if node := nodes.get(seen):
            cluster.kill(node)
            reading.crew.kill_one(rng)
        if seen in (20_000, 45_000):
            cluster.start()

    doubles = reading.read(count, act)
    assert writer.wait(60) == 0, str(writer)
    record_property(
        "a stream on a cluster",
        f"{count} lines, none skipped; two nodes killed; {doubles} twice in the stream",
    )
    assert reading.crew.killed == 2


@pytest.mark.speed
def test_reading_is_fast(scripts: Scripts, tmp_path: Path, record_property: Record) -> None:
    """At its best prefetch, beside receive.py, which reads the same lines from a classic queue with
    automatic acknowledgement. They take turns, and it is the best of three."""
    count = 100_000
    assert start_to_fill(scripts, tmp_path, count).wait(60) == 0
    fill_queue = copy_of_new_tasks(tmp_path, "hello")
    output = tmp_path / "output"

    def rate(script: str, *options: str) -> float:
        """Return how many lines are printed into a file in a second, from the first to the last."""
        with output.open("wb") as file:
            started = scripts.start(script, *options, stdout=file)

        def has_last_line() -> bool:
            with output.open("rb") as file:
                file.seek(max(0, output.stat().st_size - 50))
                return b"line %d" % (count - 1) in file.read()

        eventually(lambda: output.stat().st_size, "the first line")
        begin = time.monotonic()
        eventually(has_last_line, "the last line", 120)
        seconds = time.monotonic() - begin
        started.kill()
        return count / seconds

    ways = {
        "stream, prefetch 1000": (READ, "--from", "first", "--prefetch", "1000"),
        "stream, prefetch 10000": (READ, "--from", "first", "--prefetch", "10000"),
        "classic queue": (RECEIVE,),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3):
        scripts.run(fill_queue, str(tmp_path / "lines"))
        for way, command in ways.items():
            rates[way].append(rate(*command))
    for way, each in rates.items():
        record_property(f"reading: {way}", f"{max(each):,.0f} lines/s")
    del rates["classic queue"]
    assert max(map(max, rates.values())) >= 25_000
