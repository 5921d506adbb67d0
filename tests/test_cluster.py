"""Three nodes: RabbitMQ and its tasks outlive the death of any one of them."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import DONE, Scripts, consumer, expect_waiting
from tools.broker import Cluster, virtual_host_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def queue(cluster: Cluster, amqp_url: str) -> dict[str, Any]:
    """Return what the cluster says about the queue of tasks."""
    return dict(cluster.api("GET", f"queues/{virtual_host_of(amqp_url)}/task_queue"))


def send(scripts: Scripts, task: str, *options: str) -> None:
    """Send a task, which must be confirmed."""
    sent = scripts.run("work_queues/new_task.py", *options, task)
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
    consumer(scripts, "work_queues/worker.py").expect(re.compile(r" \[x\] Received 'Survivor'.*"))


def test_a_killed_leader_takes_nothing_with_it(
    cluster: Cluster, scripts: Scripts, amqp_url: str
) -> None:
    """Another node leads the queue, and has all confirmed tasks, also transient ones. A worker that
    was connected to the killed node goes on by itself on another one, with the task in its hands.
    So do an RPC server and a receiver of logs."""
    tasks = ["In hand...", *(f"task {n}" for n in range(10))]
    for task in tasks[:-1]:
        send(scripts, task)
    send(scripts, tasks[-1], "--transient")
    assert queue(cluster, amqp_url)["leader"] == "rabbit@rabbit1"  # the first of the addresses
    worker = consumer(scripts, "work_queues/worker.py")
    server = consumer(scripts, "rpc/rpc_server.py")
    logger = consumer(scripts, "publish_subscribe/receive_logs.py")
    worker.expect(" [x] Received 'In hand...'")

    cluster.kill("rabbit1")
    for each in (worker, server, logger):
        expect_waiting(each, count=2)

    worker.expect(" [x] Received 'In hand...' (redelivered)")
    worker.expect(DONE, count=len(tasks) + 1)  # the one in its hands was done twice
    assert {line for line in worker.out.seen if "Received" in line} >= {
        f" [x] Received '{task}'" for task in tasks
    }
    assert queue(cluster, amqp_url)["leader"] != "rabbit@rabbit1"
    scripts.run("publish_subscribe/emit_log.py", "after the kill")
    logger.expect(" [x] after the kill")
    assert scripts.run("rpc/rpc_client.py", "10").out.seen[-1] == " [.] Got 55"


def test_without_a_majority_no_task_is_reported_as_sent(
    cluster: Cluster, scripts: Scripts, tmp_path: Path
) -> None:
    """The producers say so in one line in bounded time. With the majority back, the consumers go on
    by themselves, and tasks are sent again. So does new_tasks.py, which has waited."""
    (tmp_path / "tasks").write_text("patient")
    consumer(scripts, "dead_letters/worker.py").stop()  # it has declared its queues
    worker = consumer(scripts, "work_queues/worker.py")
    logger = consumer(scripts, "publish_subscribe/receive_logs.py")
    send(scripts, "before")
    worker.expect(DONE)
    cluster.sync()
    cluster.kill("rabbit1", "rabbit2")  # all were connected to the first one
    begin = time.monotonic()
    patient = scripts.start("publisher_confirms/new_tasks.py", str(tmp_path / "tasks"))
    for name in ("work_queues/new_task.py", "dead_letters/new_task.py"):
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
    scripts.run("publish_subscribe/emit_log.py", "after")
    logger.expect(" [x] after")


def test_a_task_outlives_thirty_workers(scripts: Scripts) -> None:
    """A worker that is stopped or killed thirty times with the same task loses nothing: the limit
    of twenty returns, after which RabbitMQ drops a task, is raised."""
    send(scripts, "Long....................")
    for n in range(30):
        worker = scripts.start("work_queues/worker.py")
        worker.expect(re.compile(r" \[x\] Received 'Long\.+'.*"))
        worker.kill() if n % 2 else worker.stop()
    last = scripts.start("work_queues/worker.py")
    last.expect(" [x] Received 'Long....................' (redelivered)")
