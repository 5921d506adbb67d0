"""Streams: a log that each reader can read from any place, and read again."""

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

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ConnectionClosedByBroker

from tests.proxy import ACK, PUBLISH, Proxy
from tests.scripts import LOGS_WAITING, LOST, Crew, Script, Scripts, one_line
from tools import ROOT, environment
from tools.broker import Broker, Cluster, eventually, virtual_host_of

EMIT = "streams/emit_log_stream.py"
READ = "streams/read_logs.py"
STREAM = {"x-queue-type": "stream"}


def emit(scripts: Scripts, *lines: str) -> None:
    """Write these lines, each of them confirmed before the next one is sent."""
    text = "".join(f"{line}\n" for line in lines)
    command = [sys.executable, EMIT, "-"]
    env = environment(scripts.amqp_url)
    ended = subprocess.run(command, cwd=ROOT, env=env, input=text, capture_output=True, text=True)
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == [f" [x] Sent {line!r}" for line in lines]


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


def fill(channel: BlockingChannel, first: int, last: int, end: bytes = b"") -> None:
    """Write such lines as fast as it goes."""
    channel.queue_declare("log_stream", durable=True, arguments=STREAM)
    for n in range(first, last + 1):
        channel.basic_publish("", "log_stream", b"line %d" % n + end)
    channel.queue_declare("log_stream", passive=True)


def offset_of(line: str) -> int:
    """Return the offset in a line that a reader has printed."""
    found = re.match(r" \[x\] (\d+): ", line)
    assert found, line
    return int(found[1])


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

    check({place: [] for place in ("first", "last", "5", "1h")})
    emit(scripts, *(f"line {n}" for n in range(5)))
    between = datetime.now().astimezone().replace(microsecond=0) + timedelta(seconds=1)
    eventually(lambda: datetime.now().astimezone() > between, "the next second")
    emit(scripts, *(f"line {n}" for n in range(5, 8)))
    check(
        {
            **{place: shown(0, 7) for place in ("first", "0", "1h")},
            "last": shown(7, 7),
            "3": shown(3, 7),
            between.isoformat(): shown(5, 7),
            between.replace(tzinfo=None).isoformat(): shown(5, 7),
            (between + timedelta(days=1)).isoformat(): [],
            **{place: [] for place in ("next", "8")},
        }
    )


def test_next_is_what_is_written_from_then_on(scripts: Scripts) -> None:
    """This is the default. A reader that starts at the first line gets the new ones, too."""
    emit(scripts, "line 0", "line 1")
    late = reader(scripts)
    early = reader(scripts, "--from", "first")
    emit(scripts, "line 2", "line 3")
    late.expect(" [x] 3: line 3")
    early.expect(" [x] 3: line 3")
    assert late.out.seen == shown(2, 3)
    assert early.out.seen == shown(0, 3)


def test_until_end_means_what_was_there_at_the_start(scripts: Scripts) -> None:
    """A reader ends also while lines are written without a pause, faster than it reads."""
    emit(scripts, "line 0", "line 1", "line 2")
    slow = scripts.start(READ, "--from", "first", "--until-end", "--pause", "0.5")
    slow.expect(" [x] 0: line 0")
    emit(scripts, "line 3", "line 4")
    assert slow.wait() == 0
    assert slow.out.seen == shown(0, 2)


def test_a_place_that_is_none_is_refused(scripts: Scripts) -> None:
    """The usage is shown, and the status is 2."""
    places = ["0x", "-1", "1.5", "yesterday", "0001-01-01", "9999-12-31", str(2**63), ""]
    for place, started in [(p, scripts.start(READ, f"--from={p}")) for p in places]:
        assert started.wait() == 2
        assert f"argument --from: invalid place value: {place!r}" in started.err.seen[-1]


def test_a_line_is_one_line(scripts: Scripts) -> None:
    """Whatever is in it: control characters and bytes that are no text are escaped."""
    scripts.run(EMIT, b"caf\xe9", "\x1b[31m", "a\nb", "你好")
    scripts.run(EMIT)
    assert read(scripts) == [
        r" [x] 0: caf\udce9 \x1b[31m a\nb 你好",
        " [x] 1: info: Hello World!",
    ]


# --- Readers do nothing to the stream, nor to each other ---


def test_reading_takes_nothing_away(scripts: Scripts, channel: BlockingChannel) -> None:
    """Ten readers at ten places each get what they ask for, and so does one that comes later. One
    that is stopped in the middle holds up nobody."""
    fill(channel, 0, 4999)
    stuck = scripts.start(READ, "--from", "first", "--prefetch", "1", "--pause", "100")
    stuck.expect(" [x] 0: line 0")
    places = range(0, 5000, 500)
    ten = [scripts.start(READ, "--from", str(place), "--until-end") for place in places]
    for place, each in zip(places, ten, strict=True):
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
        for offset in map(offset_of, script.out.seen):
            assert offset in (len(printed), len(printed) - 1)
            if offset == len(printed):
                printed.append(offset)
            else:
                repeated += 1
        assert len(script.out.seen) == len(set(script.out.seen))
    assert repeated <= 20
    assert printed == list(range(10000))
    assert read(scripts, "first", "--name", name) == []
    emit(scripts, "line 10000")
    assert read(scripts, "first", "--name", name) == shown(10000, 10000)


def test_a_name_that_has_read_nothing_yet_misses_nothing(scripts: Scripts, tmp_path: Path) -> None:
    """A reader with a name that was at the end, and was killed there, gets what came meanwhile."""
    emit(scripts, "line 0")
    name = str(tmp_path / "anna")
    reader(scripts, "--name", name).kill()
    emit(scripts, "line 1")
    assert read(scripts, "next", "--name", name) == shown(1, 1)


def test_a_file_with_something_else_is_refused(scripts: Scripts, tmp_path: Path) -> None:
    """It is not read as an offset, and stays as it is. A folder that is not there is one line."""
    (tmp_path / "anna.offset").write_text("dear diary")
    refused = scripts.run(READ, "--name", str(tmp_path / "anna"), status=2)
    assert "argument --name: invalid" in refused.err.seen[-1]
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
    with a name and those without, those that have read and those that have not."""
    emit(scripts, *(f"line {n}" for n in range(100)))
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
    published = confirmed = 0

    def watch(index: int, to_broker: bool) -> bool:
        nonlocal published, confirmed
        published += index == PUBLISH and to_broker
        confirmed += index == ACK and not to_broker
        return confirmed < 3

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        command = [sys.executable, EMIT, "-"]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(proxy.url),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin
        process.stdin.write("one\ntwo\nthree\nfour\n")
        process.stdin.flush()
        eventually(lambda: confirmed == 3, "RabbitMQ has confirmed three lines")
        proxy.cut()
        out, err = process.communicate(timeout=15)
    assert process.returncode == 1
    assert out.splitlines() == [" [x] Sent 'one'", " [x] Sent 'two'"]
    assert re.fullmatch(r" \[!\] .+\n", err)
    assert published == 3


def test_an_emitter_that_waits_for_input_keeps_its_connection(scripts: Scripts) -> None:
    """pika sends heartbeats meanwhile, and a line is sent when it comes."""
    frames = 0  # that are no methods: heartbeats, and the two with the content of a message

    def watch(index: int, to_broker: bool) -> bool:
        nonlocal frames
        frames += index == 0 and to_broker
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        process = subprocess.Popen(
            [sys.executable, ROOT / EMIT, "-"],
            env=environment(f"{proxy.url}?heartbeat=2"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin
        assert process.stdout
        for line in ("one", "two"):
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            assert process.stdout.readline() == f" [x] Sent '{line}'\n"
            seen = frames
            eventually(lambda seen=seen: frames >= seen + 2, "two heartbeats")  # type: ignore[misc]
        process.stdin.close()
        assert process.wait(15) == 0


def test_acknowledgements_are_joint_and_none_waits_long(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """Many lines are acknowledged at once; a lone one within about a second, because RabbitMQ
    before 4.3 closes the channel of a consumer that leaves one unacknowledged for half an hour."""
    acknowledged = 0

    def watch(index: int, to_broker: bool) -> bool:
        nonlocal acknowledged
        acknowledged += index == ACK and to_broker
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        started = reader(scripts, amqp_url=proxy.url)
        emit(scripts, "line 0")
        eventually(lambda: acknowledged == 1, "the line is acknowledged", 5)
        fill(channel, 1, 5000)
        started.expect(" [x] 5000: line 5000")
        assert acknowledged <= 1 + 10 + 5
        assert started.err.seen == [LOGS_WAITING]


# --- Retention ---


def test_retention_removes_the_oldest_lines_and_nothing_else(
    broker: Broker, scripts: Scripts, amqp_url: str
) -> None:
    """What is left is the end of the stream, without a gap. A reader that asks for what is gone
    starts at the first line that is there."""
    path = f"policies/{virtual_host_of(amqp_url)}/small"
    definition = {"max-length-bytes": 20_000, "stream-max-segment-size-bytes": 5_000}
    broker.api("PUT", path, {"pattern": "^log_stream$", "definition": definition})
    emit(scripts, *(f"line {n}" for n in range(600)))

    def left() -> list[str]:
        lines = read(scripts)
        return lines if len(lines) < 600 else []

    lines = eventually(left, "the first lines are removed")
    texts = [line.partition(": ")[2] for line in lines]
    assert texts == [f"line {n}" for n in range(600 - len(lines), 600)]
    offsets = [offset_of(line) for line in lines]
    assert all(one < following for one, following in pairwise(offsets))
    assert read(scripts, 0) == lines
    assert read(scripts, offsets[10]) == lines[10:]


# --- What RabbitMQ refuses ---


def test_a_reader_without_a_prefetch_limit_is_refused(scripts: Scripts) -> None:
    """RabbitMQ says so, and the reader ends."""
    line = one_line(scripts.start(READ, "--prefetch", "0"))
    assert "PRECONDITION_FAILED - consumer prefetch count is not set" in line


@pytest.mark.parametrize("how", ["automatic acknowledgement", "basic_get"])
def test_what_a_stream_cannot_do_costs_the_connection(channel: BlockingChannel, how: str) -> None:
    """Automatic acknowledgement and basic_get are not implemented for streams."""
    channel.queue_declare("log_stream", durable=True, arguments=STREAM)
    channel.basic_qos(prefetch_count=1)
    wrong = {
        "automatic acknowledgement": partial(channel.basic_consume, "log_stream", print, True),
        "basic_get": partial(channel.basic_get, "log_stream"),
    }[how]
    with pytest.raises(ConnectionClosedByBroker) as error:
        wrong()
    assert error.value.reply_code == 540


def test_a_queue_of_another_type_is_refused(scripts: Scripts, channel: BlockingChannel) -> None:
    """A stream cannot have the name of a queue that exists."""
    channel.queue_declare("log_stream", durable=True)
    for script in (EMIT, READ):
        line = one_line(scripts.start(script))
        assert "PRECONDITION_FAILED - inequivalent arg 'x-queue-type'" in line


# --- Endurance, a cluster, and speed ---


def filler(folder: Path) -> str:
    """Make a copy of new_tasks.py that fills the stream: fast, and no line is lost."""
    script = (ROOT / "publisher_confirms/new_tasks.py").read_text()
    script = script.replace('"task_queue"', '"log_stream"')
    script = script.replace("durable=True", f"durable=True, arguments={STREAM}")
    path = folder / "fill.py"
    path.write_text(script)
    return str(path)


def numbered(folder: Path, count: int) -> str:
    """Make a file of so many numbered lines."""
    path = folder / "lines"
    path.write_text("".join(f"line {n}\n" for n in range(count)))
    return str(path)


class Reading:
    """A reader with a name that is killed again and again, and all that it prints."""

    def __init__(self, scripts: Scripts, name: Path, *options: str) -> None:
        command = [READ, "--from", "first", "--name", str(name), *options]
        self.crew = Crew(scripts, 1, *command)
        self.texts: dict[int, str] = {}  # by offset
        self.order: list[int] = []  # of the offsets, as they came for the first time
        self.repeated = 0

    def read(self, count: int, act: Callable[[int], None]) -> None:
        """Read so many different lines, and act with the number of those that have come."""
        seen: set[str] = set()
        for _, line in self.crew.read():
            if not line.startswith(" [x] "):
                continue  # what is printed on standard error comes here, too
            offset, text = offset_of(line), line.partition(": ")[2]
            if offset in self.texts:
                assert self.texts[offset] == text
                self.repeated += 1
                continue
            self.texts[offset] = text
            self.order.append(offset)
            if text not in seen:
                seen.add(text)
                if len(seen) == count:
                    return
                act(len(seen))

    def check(self, count: int) -> int:
        """All lines came, in the order of their offsets; return how many the stream has twice."""
        assert self.order == sorted(self.order)
        assert set(self.texts.values()) == {f"line {n}" for n in range(count)}
        assert set(self.crew.complaints()) == {LOGS_WAITING}
        return len(self.texts) - count


@pytest.mark.endurance
@pytest.mark.timeout(400)
def test_a_stream_under_fire(
    own_broker: Broker,
    scripts: Scripts,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """RabbitMQ is stopped and killed while many lines are written and read, and a reader with a
    name is killed again and again. It skips none of them. A kill repeats one line at most."""
    count = 100_000
    rng = random.Random(18)
    kills = set(rng.sample(range(1, count), 30))
    outages = {2000, *rng.sample(range(10_000, count), 3)}  # at the first, much is to be written
    pika.BlockingConnection(pika.URLParameters(scripts.amqp_url)).channel().queue_declare(
        "log_stream", durable=True, arguments=STREAM
    )
    own_broker.sync()
    writer = Script(
        [sys.executable, filler(tmp_path), numbered(tmp_path, count)],
        environment(scripts.amqp_url),
    )
    scripts.started.append(writer)
    reading = Reading(scripts, tmp_path / "anna")

    def act(seen: int) -> None:
        if seen in outages:
            own_broker.stop() if len(outages) % 2 else own_broker.kill()
            outages.remove(seen)
            own_broker.start()
        if seen in kills:
            reading.crew.kill_one(rng)

    reading.read(count, act)
    assert writer.wait(60) == 0, str(writer)
    doubles = reading.check(count)
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
    cluster: Cluster,
    scripts: Scripts,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """The node to which all are connected is killed while lines are written and read, and so is
    another one after its return. No confirmed line is lost, and the reader skips none."""
    count = 60_000
    rng = random.Random(18)
    begun = scripts.run(EMIT, "line 0")
    assert begun.out.seen == [" [x] Sent 'line 0'"]
    cluster.sync()
    writer = Script(
        [sys.executable, filler(tmp_path), numbered(tmp_path, count)],
        environment(scripts.amqp_url),
    )
    scripts.started.append(writer)
    reading = Reading(scripts, tmp_path / "anna")
    nodes = {10_000: "rabbit1", 35_000: "rabbit2"}

    def act(seen: int) -> None:
        if node := nodes.get(seen):
            cluster.kill(node)
            reading.crew.kill_one(rng)
        if seen in (20_000, 45_000):
            cluster.start()

    reading.read(count, act)
    assert writer.wait(60) == 0, str(writer)
    doubles = reading.check(count)
    record_property(
        "a stream on a cluster",
        f"{count} lines, none skipped; two nodes killed; {doubles} twice in the stream",
    )
    assert reading.crew.killed == 2


@pytest.mark.speed
def test_reading_is_fast(
    scripts: Scripts, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """At its best prefetch, beside receive.py, which reads the same lines from a classic queue with
    automatic acknowledgement. They take turns, and it is the best of three."""
    count = 100_000
    lines = numbered(tmp_path, count)
    env = environment(scripts.amqp_url)
    fill_fast = partial(subprocess.run, env=env, stdout=subprocess.DEVNULL, check=True)
    fill_fast([sys.executable, filler(tmp_path), lines])
    hello = (ROOT / "publisher_confirms/new_tasks.py").read_text().replace("task_queue", "hello")
    (tmp_path / "hello.py").write_text(hello)

    def rate(script: str, *options: str) -> float:
        """Return how many lines are printed into a file in a second, from the first to the last."""
        output = tmp_path / "output"
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

    rates: dict[str, list[float]] = {}
    for _ in range(3):
        for prefetch in ("1000", "10000"):
            command = [READ, "--from", "first", "--prefetch", prefetch]
            rates.setdefault(f"stream, prefetch {prefetch}", []).append(rate(*command))
        fill_fast([sys.executable, str(tmp_path / "hello.py"), lines])
        rates.setdefault("classic queue", []).append(rate("hello_world/receive.py"))
    best = {what: max(each) for what, each in rates.items()}
    for what, each in best.items():
        record_property(f"reading: {what}", f"{each:,.0f} lines/s")
    assert max(each for what, each in best.items() if "stream" in what) >= 25_000
