"""Three nodes: RabbitMQ and its tasks outlive the death of any one of them."""

from __future__ import annotations

import json
import random
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import (
    DONE,
    EMIT_LOG,
    FILE_WORKER,
    NEW_FILE,
    NEW_TASK,
    NEW_TASKS,
    RECEIVE_LOGS,
    RECEIVED,
    RPC_SERVER,
    WORKER,
    Crew,
    Script,
    Scripts,
    consumer,
    expect_waiting,
    fibonacci,
    received,
    stream_of,
    tasks_of,
)
from tools.broker import Cluster, eventually, virtual_host_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def queue(cluster: Cluster, amqp_url: str) -> dict[str, Any]:
    """Return what the cluster says about the queue of tasks."""
    return dict(cluster.api("GET", f"queues/{virtual_host_of(amqp_url)}/task_queue"))


def send(scripts: Scripts, task: str, *options: str) -> None:
    """Send a task, which must be confirmed."""
    sent = scripts.run(NEW_TASK, *options, task)
    assert sent.out.seen == [f" [x] Sent '{task}'"]


def test_one_command_starts_three_nodes_and_their_data_stay(
    cluster: Cluster, scripts: Scripts, amqp_url: str
) -> None:
    """`docker compose up -d --wait` returns when all three nodes are in the cluster. They are on
    127.0.0.1 only. Queues are replicated, without a word of the script about it. After `docker
    compose down` and another `up`, the task that was sent is still there."""
    send(scripts, "Survivor")
    nodes = {f"rabbit@{node}" for node in cluster.urls}
    assert {node["name"] for node in cluster.api("GET", "nodes") if node["running"]} == nodes
    shown = queue(cluster, amqp_url)
    assert shown["type"] == "quorum"
    assert set(shown["members"]) == set(shown["online"]) == nodes
    for container in cluster.compose("ps", "-q").split():
        [state] = json.loads(subprocess.check_output(["docker", "inspect", container]))
        published = [to for to in state["NetworkSettings"]["Ports"].values() if to]
        assert {to["HostIp"] for bindings in published for to in bindings} == {"127.0.0.1"}
        assert len(published) == 2

    cluster.compose("down")
    cluster.compose("up", "-d", "--wait")  # cluster.start() would try a second time
    assert {node["name"] for node in cluster.api("GET", "nodes") if node["running"]} == nodes
    consumer(scripts, WORKER).expect(re.compile(r" \[x\] Received 'Survivor'.*"))


def test_a_killed_leader_takes_nothing_with_it(
    cluster: Cluster, scripts: Scripts, amqp_url: str
) -> None:
    """Another node leads the queue, and has all confirmed tasks, also transient ones. A worker that
    was connected to the killed node goes on by itself on another one, with the task in its hands.
    (That an RPC server and a receiver of logs do, too, is tested by playing the lesson.)"""
    tasks = ["In hand...", *(f"task {n}" for n in range(10))]
    for task in tasks[:-1]:
        send(scripts, task)
    send(scripts, tasks[-1], "--transient")
    assert queue(cluster, amqp_url)["leader"] == "rabbit@rabbit1"  # the first of the addresses
    worker = consumer(scripts, WORKER)
    worker.expect(received("In hand..."))

    cluster.kill("rabbit1")
    expect_waiting(worker, count=2)
    worker.expect(received("In hand...", redelivered=True))
    worker.expect(DONE, count=len(tasks) + 1)  # the one in its hands is done twice
    assert set(tasks_of(worker)) == set(tasks)
    assert queue(cluster, amqp_url)["leader"] != "rabbit@rabbit1"


def test_without_a_majority_no_task_is_reported_as_sent(
    cluster: Cluster, scripts: Scripts, tmp_path: Path
) -> None:
    """The producers say so in one line in bounded time. With the majority back, the consumers go on
    by themselves, and tasks are sent again. So does new_tasks.py, which has waited."""
    (tmp_path / "tasks").write_text("patient")
    consumer(scripts, FILE_WORKER).stop()  # it has declared its queues
    worker = consumer(scripts, WORKER)
    logger = consumer(scripts, RECEIVE_LOGS)
    send(scripts, "before")
    worker.expect(DONE)
    cluster.sync()
    cluster.kill("rabbit1", "rabbit2")  # all were connected to the first one
    begin = time.monotonic()
    patient = scripts.start(NEW_TASKS, str(tmp_path / "tasks"))
    for name in (NEW_TASK, NEW_FILE):
        refused = scripts.start(name, "meanwhile")
        assert refused.wait() == 1
        assert refused.out.seen == []
        told = " [!] No confirm within 10 s: nobody knows if the task is stored"
        assert refused.err.seen == [told]
    assert time.monotonic() - begin < 30
    patient.expect_error(" [!] No answer from RabbitMQ for 10 seconds; still waiting")

    cluster.start("rabbit1", "rabbit2")
    assert patient.wait(60) == 0, str(patient)
    assert patient.out.seen == [" [x] Sent 1 tasks"]
    send(scripts, "after")
    worker.expect(re.compile(r" \[x\] Received 'after'.*"))
    expect_waiting(logger, count=2)
    scripts.run(EMIT_LOG, "after")
    logger.expect(" [x] after")


def test_a_task_outlives_thirty_workers(scripts: Scripts) -> None:
    """A worker that is stopped or killed thirty times with the same task loses nothing: the limit
    of twenty returns, after which RabbitMQ drops a task, is raised."""
    send(scripts, "Long....................")
    for n in range(30):
        worker = scripts.start(WORKER)
        worker.expect(re.compile(r" \[x\] Received 'Long\.+'.*"))
        worker.kill() if n % 2 else worker.stop()
    last = scripts.start(WORKER)
    last.expect(" [x] Received 'Long....................' (redelivered)")


# --- Endurance ---

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
                sender = scripts.start(NEW_TASK, task)
                sender.wait()
                if f" [x] Sent '{task}'" in sender.out.seen:
                    confirmed.add(task)

    in_hand: dict[int, str] = {}

    def until_done(count: int) -> None:
        """Read what the workers print until this number of different tasks have been done, or
        until they print nothing for a long time."""
        for number, line in workers.read():
            if found := RECEIVED.fullmatch(line):
                in_hand[number] = found[1]
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
        scripts.run(EMIT_LOG, f"log {len(killed)}")
        for logger in loggers:
            logger.expect(f" [x] log {len(killed)}")

    workers = Crew(scripts, 3, WORKER)
    servers = Crew(scripts, 2, RPC_SERVER)
    for member in [*workers.members, *servers.members]:
        expect_waiting(member)
    loggers = [consumer(scripts, RECEIVE_LOGS) for _ in range(2)]
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
    wrong = [call for call in calls if call[1] not in (None, fibonacci(call[0]))]
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
    assert max(seconds for _, _, seconds in calls) < 5 + 5, "on a busy machine"
    assert workers.complaints() == servers.complaints() == []
    assert all(each.process.poll() is None for each in everyone)
