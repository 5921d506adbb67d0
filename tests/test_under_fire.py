"""Endurance: nothing is lost, answered wrongly or brought down while processes and brokers die.

What is killed, and when, is told by counting the lines that the scripts print, at line numbers
drawn by a seeded random generator. So a kill finds the scripts in the middle of whatever they do,
and a busy machine changes how long a test takes, not what it does.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pika
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import BasicProperties

from tests.scripts import (
    CONSUMERS,
    DONE,
    RECEIVED,
    Crew,
    Script,
    Scripts,
    consumer,
    expect_waiting,
    stream_of,
)
from tools import TIMEOUT
from tools.broker import Broker, Cluster, eventually, virtual_host_of

FIBONACCI = [0, 1]
while len(FIBONACCI) <= 35:
    FIBONACCI.append(FIBONACCI[-2] + FIBONACCI[-1])


@pytest.mark.timeout(400)  # three brokers that are slow to start
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

    def publish(mine: list[str]) -> None:
        channel: BlockingChannel | None = None
        for task in mine:
            ahead.acquire()
            while task not in confirmed and not over.is_set():
                try:
                    if channel is None:
                        channel = pika.BlockingConnection(
                            pika.URLParameters(scripts.amqp_url)
                        ).channel()
                        channel.confirm_delivery()
                    channel.basic_publish(
                        exchange="",
                        routing_key="task_queue",
                        body=task.encode(),
                        properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent),
                        mandatory=True,
                    )
                    confirmed.add(task)
                except Exception:  # whatever it was, the task is not confirmed
                    channel = None
                    broker_is_up.wait()

    def send(mine: list[str]) -> None:
        for task in mine:
            while task not in confirmed and not over.is_set():
                sender = scripts.start("work_queues/new_task.py", task)
                sender.wait()
                if f" [x] Sent '{task}'" in sender.out.seen:
                    confirmed.add(task)
                else:
                    broker_is_up.wait()

    workers = Crew(scripts, 4, "work_queues/worker.py")
    for worker in workers.members:
        worker.expect(" [*] Waiting for tasks. To exit press CTRL+C")
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
                if received := RECEIVED.fullmatch(line):
                    in_hand[worker_number] = received[1]
                    redelivered += bool(received[2])
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

    servers = Crew(scripts, 3, "rpc/rpc_server.py")
    for server in servers.members:
        server.expect(" [x] Awaiting RPC requests")
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
                good = [FIBONACCI[n] == result for n, result in zip(numbers, results, strict=True)]
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


# One call after another; after an error with a new connection, as a program would do.
CALLER = """
import json, random, sys, time
sys.path.insert(0, "rpc")
from pika.exceptions import AMQPError
from rpc_client import FibonacciRpcClient

rng = random.Random(3)
while True:
    try:
        with FibonacciRpcClient() as client:
            while True:
                n, result, begin = rng.randint(15, 22), None, time.monotonic()
                try:
                    result = client.call(n, timeout=5)
                except TimeoutError:
                    pass
                finally:
                    print(json.dumps([n, result, time.monotonic() - begin]), flush=True)
                time.sleep(0.1)
    except AMQPError:
        time.sleep(0.5)
"""


def returns(script: Script, killed: list[float]) -> list[float]:
    """Return how many seconds after these moments a consumer said again that it waits.

    Only of those after which it did so before the next one.
    """
    stream, line = stream_of(script)
    times = [at for seen, at in zip(stream.seen, stream.times, strict=True) if seen == line]
    spans = pairwise([*killed, time.monotonic()])
    return [at - kill for kill, following in spans for at in times if kill < at < following]


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_cluster_under_fire(
    cluster: Cluster,
    scripts: Scripts,
    amqp_url: str,
    record_property: Callable[[str, object], None],
) -> None:
    """Nodes are killed and stopped, one at a time, and twice two of them are killed together, while
    tasks, RPC calls and logs flow. Every confirmed task is done, every call gives the right answer
    or ends in its time, no consumer ends, and receivers get the logs that are sent once they are
    back. A dead node is started again after five more tasks have been done without it."""
    rng = random.Random(3)
    tasks = {f"task {n}" for n in range(500)}
    confirmed: set[str] = set()
    done: Counter[str] = Counter()
    ready = threading.Semaphore(0)  # how many tasks may be sent, so that some are left for later
    over = threading.Event()

    def produce(mine: list[str]) -> None:
        for task in mine:
            ready.acquire()
            while task not in confirmed and not over.is_set():
                sender = scripts.start("work_queues/new_task.py", task)
                sender.wait()
                if f" [x] Sent '{task}'" in sender.out.seen:
                    confirmed.add(task)

    in_hand: dict[int, str] = {}

    def until_done(count: int) -> None:
        """Read what the workers print until this number of different tasks have been done, or
        until they print nothing for a long time."""
        for number, line in workers.read():
            if received := RECEIVED.fullmatch(line):
                in_hand[number] = received[1]
            elif line == DONE:
                done[in_hand[number]] += 1
            if len(done) >= min(count, len(tasks)):
                return

    killed: list[float] = []

    def strike(how: Callable[..., None], *nodes: str) -> None:
        ready.release(28)
        until_done(len(done) + 8)
        killed.append(time.monotonic())
        how(*nodes)
        if len(nodes) == 1:
            until_done(len(done) + 5)
        cluster.start(*nodes)
        bindings = f"exchanges/{virtual_host_of(amqp_url)}/logs/bindings/source"
        both = "both receivers of logs are back"
        eventually(lambda: len(cluster.api("GET", bindings)) == 2, both, 30)
        scripts.run("publish_subscribe/emit_log.py", f"log {len(killed)}")
        for logger in loggers:
            logger.expect(f" [x] log {len(killed)}")

    workers = Crew(scripts, 3, "work_queues/worker.py")
    servers = Crew(scripts, 2, "rpc/rpc_server.py")
    for member in [*workers.members, *servers.members]:
        expect_waiting(member)
    loggers = [consumer(scripts, "publish_subscribe/receive_logs.py") for _ in range(2)]
    caller = Crew(scripts, 1, "-c", CALLER).members[0]
    with ThreadPoolExecutor() as threads:
        ordered = sorted(tasks)
        producers = [threads.submit(produce, ordered[part::2]) for part in range(2)]
        try:
            for n in range(15):
                how = cluster.stop if n % 4 == 3 else cluster.kill
                strike(how, rng.choice(list(cluster.urls)))
                if n in (4, 9):
                    strike(cluster.kill, *rng.sample(list(cluster.urls), 2))
            ready.release(len(tasks))
            until_done(len(tasks))
        finally:
            over.set()
            ready.release(len(tasks))
    for producer in producers:
        producer.result()
    caller.stop()

    calls = [json.loads(line) for line in caller.out.seen]
    wrong = [call for call in calls if call[1] not in (None, FIBONACCI[call[0]])]
    everyone = [*workers.members, *servers.members, *loggers]
    away = sorted(seconds for each in everyone for seconds in returns(each, killed))
    lost = confirmed - set(done)
    record_property(
        "a cluster under fire",
        f"{len(confirmed)} confirmed, {len(done)} done, "
        f"{sum(times > 1 for times in done.values())} done twice, {len(lost)} lost; "
        f"nodes killed or stopped {len(killed)} times; {len(calls)} calls, {len(wrong)} wrong, "
        f"{sum(result is None for _, result, _ in calls)} without an answer; consumers away "
        f"{len(away)} times, for {away[len(away) // 2]:.1f} s, at most {away[-1]:.1f} s",
    )
    assert not lost
    assert confirmed == tasks
    assert wrong == []
    assert max(seconds for _, _, seconds in calls) < 5 + 2
    assert workers.complaints() == servers.complaints() == []
    assert all(each.process.poll() is None for each in everyone)


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
    | st.builds(
        lambda n, places: Decimal(n).scaleb(-places),
        st.integers(-(2**31), 2**31 - 1),
        st.integers(0, 15),
    )
    | st.integers(0, 253402300799).map(lambda n: datetime.fromtimestamp(n, timezone.utc))
    | st.text()
    | st.binary()
)


def nested(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Give the values, and lists and tables of them."""
    return (
        values | st.lists(values, max_size=3) | st.dictionaries(short_strings, values, max_size=3)
    )


reply_addresses = short_strings | st.sampled_from(
    ["", "hello", "task_queue", "rpc_queue", "logs", "nobody", "amq.rabbitmq.reply-to.nobody"]
)
properties = st.fixed_dictionaries(
    {},
    optional={
        "content_type": short_strings,
        "content_encoding": short_strings,
        "headers": st.dictionaries(header_names, nested(nested(plain_values)), max_size=3),
        "delivery_mode": st.integers(1, 2),
        "priority": st.integers(0, 255),
        "correlation_id": short_strings,
        "reply_to": reply_addresses,
        "expiration": st.integers(0, 100_000).map(str),
        "message_id": short_strings,
        "timestamp": st.integers(0, 2**64 - 1),
        "type": short_strings,
        "app_id": short_strings,
        "cluster_id": short_strings,
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
        for name in ("hello", "task_queue", "rpc_queue"):
            self.channel.basic_publish("", name, body, properties)
        for exchange in ("logs", "direct_logs", "topic_logs"):
            self.channel.basic_publish(exchange, "info", body, properties)

    def serves(self, word: str) -> None:
        """Send a good message to all, and see each serve it after all that came before."""
        begin = {name: len(script.out.seen) for name, script in self.consumers.items()}
        address = BasicProperties(reply_to=self.callback_queue, correlation_id=word)
        self.send(word.encode(), address)
        self.channel.basic_publish("", "rpc_queue", b"10", address)

        for name, lines in {
            "hello_world/receive.py": [f" [x] Received '{word}'"],
            "work_queues/worker.py": [f" [x] Received '{word}'", " [x] Done"],
            "publish_subscribe/receive_logs.py": [f" [x] {word}"],
            "routing/receive_logs_direct.py": [f" [x] info:{word}"],
            "topics/receive_logs_topic.py": [f" [x] info:{word}"],
            "rpc/rpc_server.py": [" [.] fib(10)"],
        }.items():

            def enough(seen: list[str], begin: int = begin[name], lines: list[str] = lines) -> bool:
                new = iter(seen[begin:])
                return all(line in new for line in lines)  # in this order

            script = self.consumers[name]
            assert script.out.wait_for(enough, TIMEOUT), f"{lines} did not come from {script}"
        answers: list[tuple[str | None, bytes]] = []

        def answered() -> bool:
            _method, answer, body = self.channel.basic_get(self.callback_queue, auto_ack=True)
            if answer and body:
                answers.append((answer.correlation_id, body))
            return len(answers) == 2

        eventually(answered, "two answers from the server")
        assert answers == [(word, b"not a whole number from 0 to 40"), (word, b"55")]

    def close(self) -> None:
        """Kill the consumers, and delete their queues with what is left in them."""
        for script in self.consumers.values():
            script.kill()
        channel = pika.BlockingConnection(pika.URLParameters(self.amqp_url)).channel()
        for name in ("hello", "task_queue", "rpc_queue"):
            channel.queue_delete(name)
        channel.connection.close()

    def complaints(self) -> list[str]:
        """Return all that the consumers printed on standard error, but for the greeting."""
        consumers = self.consumers.items()
        return [line for name, c in consumers for line in c.err.seen if line != CONSUMERS[name]]


def test_hostile_input(scripts: Scripts, record_property: Callable[[str, object], None]) -> None:
    """No message brings a consumer down, makes it reconnect, or keeps it from serving the next."""
    sent = 0
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
        nonlocal sent, batches, target
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
        sent += len(batch)
        batches += 1

    attack()
    record_property(
        "hostile input", f"{sent} messages to each of {len(ATTACKED)} consumers, all live"
    )
    assert sent >= 2000
