"""Endurance: nothing is lost, answered wrongly or brought down while processes and brokers die.

What is killed, and when, is told by counting the lines that the scripts print, at line numbers
drawn by a seeded random generator. So a kill finds the scripts in the middle of whatever they do,
and a busy machine changes how long a test takes, not what it does.
"""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pika
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError
from pika.spec import BasicProperties

from tests.scripts import (
    CONSUMERS,
    DONE,
    FILE_WORKER,
    NEW_TASK,
    PARKED,
    RECEIVE,
    RECEIVE_DIRECT,
    RECEIVE_LOGS,
    RECEIVE_TOPIC,
    RECEIVED,
    RPC_SERVER,
    WORKER,
    Crew,
    Scripts,
    consumer,
    expect_waiting,
    fibonacci,
    put,
    received,
    size,
    take,
    worker_that,
)
from tools.broker import Broker, eventually

pytestmark = [pytest.mark.endurance, pytest.mark.timeout(400)]  # brokers that are slow to start


def test_tasks_under_fire(
    own_broker: Broker, scripts: Scripts, record_property: Callable[[str, object], None]
) -> None:
    """Every confirmed task is done, however often workers and the broker are killed.

    Most tasks are published by one producer of the test's own, which sends what new_task.py sends;
    every 20th comes from new_task.py itself. Every 40th task takes a second, the others none.
    A task counts as done when a worker has printed so, after it has printed to have received it.
    """
    rng = random.Random(3)
    tasks = [f"task-{n}" + "." * (n % 40 == 20) for n in range(500)]
    lines_at_least = 2 * len(tasks)  # received, done
    kill_at = set(rng.sample(range(lines_at_least), 32))
    outage_at = set(rng.sample(range(lines_at_least), 3))

    confirmed: set[str] = set()
    done: Counter[str] = Counter()
    redelivered = 0
    ahead = threading.Semaphore(30)  # how many tasks the producer may be ahead of the workers
    broker_is_up = threading.Event()
    broker_is_up.set()
    over = threading.Event()

    url = pika.URLParameters(scripts.amqp_url)

    def publish(mine: list[str]) -> None:
        channel: BlockingChannel | None = None
        for task in mine:
            ahead.acquire()
            while task not in confirmed and not over.is_set():
                try:
                    channel = channel or pika.BlockingConnection(url).channel()
                    put(channel, "task_queue", task)
                    confirmed.add(task)
                except Exception:  # whatever it was, the task is not confirmed
                    channel = None
                    broker_is_up.wait()

    def send(mine: list[str]) -> None:
        for task in mine:
            while task not in confirmed and not over.is_set():
                sender = scripts.start(NEW_TASK, task)
                sender.wait()
                if f" [x] Sent '{task}'" in sender.out.seen:
                    confirmed.add(task)
                else:
                    broker_is_up.wait()

    workers = Crew(scripts, 4, WORKER)
    for worker in workers.members:
        expect_waiting(worker)
    own_broker.sync()  # the first kill comes soon
    in_hand: dict[int, str] = {}
    lines = 0
    outages = 0
    with ThreadPoolExecutor() as threads:
        producers = [
            threads.submit(publish, [task for n, task in enumerate(tasks) if n % 20]),
            threads.submit(send, tasks[::20]),
        ]
        try:
            for worker_number, line in workers.read():
                if found := RECEIVED.fullmatch(line):
                    in_hand[worker_number] = found[1]
                    redelivered += bool(found[2])
                elif line == DONE:
                    task = in_hand.pop(worker_number)
                    done[task] += 1
                    if done[task] == 1:
                        ahead.release()
                else:
                    continue
                if len(done) == len(tasks):
                    break
                if lines in kill_at:
                    workers.kill_one(rng)
                if lines in outage_at:
                    broker_is_up.clear()
                    own_broker.kill()
                    try:
                        workers.kill_one(rng)
                    finally:
                        own_broker.start()
                    broker_is_up.set()
                    outages += 1
                lines += 1
        finally:
            over.set()
            broker_is_up.set()
            ahead.release(len(tasks))
    lost = confirmed - set(done)
    record_property(
        "tasks under fire",
        f"{len(confirmed)} confirmed, {len(done)} done, "
        f"{sum(times > 1 for times in done.values())} done twice, {len(lost)} lost; "
        f"{redelivered} redelivered; {workers.killed} workers and {outages} brokers killed",
    )
    for producer in producers:
        producer.result()
    assert not lost
    assert len(confirmed) == len(tasks)
    assert workers.complaints() == []
    assert all(worker.process.poll() is None for worker in workers.members)


FAILING_WORK = """
    import random
    time.sleep(0.01)
    if text.startswith("always") or text.startswith("sometimes") and random.random() < 0.5:
        raise RuntimeError("as it was told to")
""".strip()


def test_failing_tasks_under_fire(
    own_broker: Broker,
    scripts: Scripts,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Each of 300 tasks is done or parked, however often workers and the broker are killed.

    A fifth of them fails at random, and a tenth always. None is parked before it has failed three
    times, unless RabbitMQ has parked it because three workers died with it.
    """
    rng = random.Random(3)
    kinds = ["always", "sometimes", "sometimes", *["good"] * 7]
    tasks = [f"{kinds[n % 10]}-{n}" for n in range(300)]
    kill_at = set(rng.sample(range(600), 20))  # lines: each task is received, and done or failed
    outage_at = set(rng.sample(range(600), 3))

    workers = Crew(scripts, 4, worker_that(FILE_WORKER, FAILING_WORK, tmp_path))
    for member in workers.members:
        expect_waiting(member)
    own_broker.sync()
    in_hand: dict[int, str] = {}
    tries: Counter[str] = Counter()
    done: Counter[str] = Counter()
    waiting = iter(tasks)
    channel: BlockingChannel | None = None
    url = pika.URLParameters(scripts.amqp_url)

    def send(task: str | None) -> None:
        nonlocal channel
        while task:
            try:
                channel = channel or pika.BlockingConnection(url).channel()
                put(channel, "tasks", task)
                task = None
            except AMQPError:  # RabbitMQ was killed meanwhile
                channel = None

    def is_parked() -> set[str]:
        lines = scripts.run(PARKED).out.all()
        return {line[6:-1] for line in lines if line.startswith(" [x] ")}

    for _ in range(20):  # so many tasks are ahead of the workers
        send(next(waiting))
    lines = outages = 0
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        try:
            number, line = workers.lines.get(timeout=1)
        except queue.Empty:
            if is_parked() | set(done) == set(tasks):
                break
            continue
        if found := RECEIVED.fullmatch(line):
            in_hand[number] = found[1]
            tries[found[1]] += 1
        elif line == DONE:
            done[in_hand.pop(number)] += 1
            send(next(waiting, None))
        elif line.startswith(" [!] '"):
            send(next(waiting, None))
        else:
            continue
        if lines in kill_at:
            workers.kill_one(rng)
        if lines in outage_at:
            own_broker.kill()
            workers.kill_one(rng)
            own_broker.start()
            outages += 1
        lines += 1
    for member in workers.members:
        assert member.process.poll() is None
        member.stop()
    while not workers.lines.empty():  # what came while we looked at the parked ones
        if found := RECEIVED.fullmatch(workers.lines.get()[1]):
            tries[found[1]] += 1
    final = pika.BlockingConnection(url).channel()
    left = [take(final, "tasks.parked") for _ in range(size(final, "tasks.parked"))]
    names = {body.decode() for _, body in left}
    by_broker = 0
    for properties, body in left:
        failures, deaths = (properties.headers.get(name, []) for name in ("failures", "x-death"))
        if any(death["reason"] == "delivery_limit" for death in deaths):
            by_broker += 1
        else:
            assert tries[body.decode()] >= len(failures) == 3
    record_property(
        "failing tasks under fire",
        f"{len(tasks)} tasks, {len(done)} done, {len(names)} parked "
        f"({by_broker} by RabbitMQ), "
        f"{sum(times > 1 for times in done.values())} done twice, {len(left) - len(names)} parked "
        f"twice, {len(names & set(done))} both, {len(set(tasks) - set(done) - names)} lost; "
        f"{tries.total()} tries; {workers.killed} workers and {outages} brokers killed",
    )
    assert set(done) | names == set(tasks)
    assert names >= {task for task in tasks if task.startswith("always")}
    assert [line for line in workers.complaints() if "as it was told to" not in line] == []


# One call after another, or a few at once. One in ten is given so little time that its answer is
# often late, and comes while the client waits for the next one.
RPC_CLIENT = """
import json, random, sys, time
sys.path.insert(0, "rpc")
from rpc_client import FibonacciRpcClient

rng = random.Random(int(sys.argv[1]))
at_once = int(sys.argv[2])
with FibonacciRpcClient() as client:
    for batch in range(100 // at_once):
        numbers = [rng.randint(18, 27) for _ in range(at_once)]
        timeout = rng.uniform(0.005, 0.05) if batch % 10 == 5 else 20
        begin = time.monotonic()
        try:
            results = client.call_many(numbers, timeout)
        except TimeoutError:
            results = None
        late = time.monotonic() - begin - timeout
        print(json.dumps([numbers, timeout, results, late]), flush=True)
"""


def test_rpc_under_fire(scripts: Scripts, record_property: Callable[[str, object], None]) -> None:
    """Every call returns the right number or raises a timeout in time, while servers are killed.

    A call that is given much time is always answered: what a killed server was about goes to
    another.
    """
    rng = random.Random(3)
    kill_at = set(rng.sample(range(160), 20))  # 180 calls or more are computed: see RPC_CLIENT

    servers = Crew(scripts, 3, RPC_SERVER)
    for server in servers.members:
        expect_waiting(server)
    clients = Crew(scripts, 0, "-c", RPC_CLIENT)
    clients.lines = servers.lines
    running = [clients.start("1", "1"), clients.start("2", "5")]

    computed = 0
    for _number, line in servers.read():
        if line.startswith(" [.] fib("):
            if computed in kill_at:
                servers.kill_one(rng)
            computed += 1
        if sum(len(client.out.seen) for client in running) == 120:
            break
    statuses = [client.wait() for client in running]
    right = wrong = timed_out = given_up = 0
    overdue = 0.0
    for client in running:
        for numbers, timeout, results, late in map(json.loads, client.out.seen):
            overdue = max(overdue, late)
            if results is None:
                timed_out += len(numbers)
                given_up += timeout == 20
            else:
                good = [fibonacci(n) == result for n, result in zip(numbers, results, strict=True)]
                right += sum(good)
                wrong += len(good) - sum(good)
    record_property(
        "RPC under fire",
        f"{right + wrong + timed_out} calls, {right} right, {timed_out} timed out, "
        f"{wrong} wrong; {computed} computed, {servers.killed} servers killed",
    )
    assert statuses == [0, 0], "\n".join(map(str, running))
    assert wrong == 0
    assert given_up == 0
    assert timed_out > 0, "answers that come too late are a part of this"
    assert overdue < 5, "seconds, on a busy machine"
    assert servers.killed >= 15
    assert all(server.err.seen == [] for server in servers.everyone)
    assert all(server.process.poll() is None for server in servers.members)


# Whatever pika can send and RabbitMQ takes. RabbitMQ itself refuses a user_id that isn't the
# sender's, an expiration that is no number of milliseconds, a delivery mode other than 1 and 2,
# headers named CC or BCC that are no lists of strings, and the address amq.rabbitmq.reply-to of one
# who does not consume from it, so a consumer never gets to see those.
short_strings = st.text(max_size=60) | st.binary(max_size=255)  # at most 255 bytes
header_names = short_strings.filter(lambda name: name not in ("CC", "BCC", b"CC", b"BCC"))
plain_values = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.builds(Decimal.scaleb, st.integers(-(2**31), 2**31 - 1).map(Decimal), st.integers(-15, 0))
    | st.integers(0, 253402300799).map(lambda n: datetime.fromtimestamp(n, timezone.utc))
    | st.text()
    | st.binary()
)


def nested(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Give the values, and lists and tables of them."""
    tables = st.dictionaries(short_strings, values, max_size=3)
    return values | st.lists(values, max_size=3) | tables


reply_addresses = short_strings | st.sampled_from(
    ["", "hello", "task_queue", "rpc_queue", "logs", "nobody", "amq.rabbitmq.reply-to.nobody"]
)
STRINGS = ["content_type", "content_encoding", "correlation_id", "message_id", "type", "app_id"]
properties = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys([*STRINGS, "cluster_id"], short_strings),
        "headers": st.dictionaries(header_names, nested(nested(plain_values)), max_size=3),
        "delivery_mode": st.integers(1, 2),
        "priority": st.integers(0, 255),
        "reply_to": reply_addresses,
        "expiration": st.integers(0, 100_000).map(str),
        "timestamp": st.integers(0, 2**64 - 1),
    },
).map(lambda some: BasicProperties(**some))


def is_quick(body: bytes) -> bool:
    """Say whether the body is neither long work for a worker (dots) nor for an RPC server."""
    try:
        return not 20 < int(body) <= 40
    except ValueError:
        return b"." not in body


bodies = (
    st.binary()
    | st.text().map(str.encode)
    | st.integers().map(lambda n: str(n).encode())
    | st.integers(0, 20).map(lambda n: str(n).encode())
    | st.sampled_from([b"9" * 5000, b"\xff" * 5000, "日本".encode("utf-16")])
).filter(is_quick)
messages = st.tuples(bodies, properties)


QUEUES = ("hello", "task_queue", "rpc_queue")
ATTACKED = [name for name in CONSUMERS if not name.startswith("dead_letters")]


class Target:
    """All consumers, each a process, and a channel that writes to them."""

    def __init__(self, scripts: Scripts) -> None:
        self.amqp_url = scripts.amqp_url
        self.consumers = {name: consumer(scripts, name) for name in ATTACKED}
        self.channel = pika.BlockingConnection(pika.URLParameters(scripts.amqp_url)).channel()
        self.callback_queue = self.channel.queue_declare("", exclusive=True).method.queue

    def send(self, body: bytes, properties: BasicProperties) -> None:
        """Send a message to all of them."""
        for name in QUEUES:
            self.channel.basic_publish("", name, body, properties)
        for exchange in ("logs", "direct_logs", "topic_logs"):
            self.channel.basic_publish(exchange, "info", body, properties)

    def serves(self, word: str) -> None:
        """Send a good message to all, and see each serve it after all that came before."""
        address = BasicProperties(reply_to=self.callback_queue, correlation_id=word)
        self.send(word.encode(), address)
        self.channel.basic_publish("", "rpc_queue", b"10", address)
        self.consumers[RECEIVE].expect(received(word))
        self.consumers[WORKER].expect(received(word))
        eventually(lambda: self.consumers[WORKER].out.seen[-1] == DONE, "the task is done")
        self.consumers[RECEIVE_LOGS].expect(f" [x] {word}")
        for name in (RECEIVE_DIRECT, RECEIVE_TOPIC):
            self.consumers[name].expect(f" [x] info:{word}")
        answers = [take(self.channel, self.callback_queue) for _ in range(2)]
        assert [its.correlation_id for its, _ in answers] == [word, word]
        assert [body for _, body in answers] == [b"not a whole number from 0 to 40", b"55"]

    def close(self) -> None:
        """Kill the consumers, and delete their queues with what is left in them."""
        for script in self.consumers.values():
            script.kill()
        channel = pika.BlockingConnection(pika.URLParameters(self.amqp_url)).channel()
        for name in QUEUES:
            channel.queue_delete(name)

    def complaints(self) -> list[str]:
        """Return all that the consumers printed on standard error, but for the greeting."""
        consumers = self.consumers.items()
        return [line for name, c in consumers for line in c.err.seen if line != CONSUMERS[name]]


def test_hostile_input(scripts: Scripts, record_property: Callable[[str, object], None]) -> None:
    """No message brings a consumer down, makes it reconnect, or keeps it from serving the next."""
    batches = 0
    target: Target | None = None

    @settings(
        max_examples=100,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # narrowing a failure down would start the consumers 500 times
    )
    @given(st.lists(messages, min_size=20, max_size=20))
    def attack(batch: list[tuple[bytes, BasicProperties]]) -> None:
        nonlocal batches, target
        # One target for all. Only a failing batch needs a second: hypothesis tries it once more.
        target = target or Target(scripts)
        try:
            for body, its_properties in batch:
                target.send(body, its_properties)
            target.serves(f"good-{batches}")
            assert target.complaints() == []
        except Exception:
            target.close()
            target = None
            raise
        batches += 1

    attack()
    sent = f"{20 * batches} messages to each of {len(ATTACKED)} consumers, all live"
    record_property("hostile input", sent)
    assert batches >= 100
