"""How all scripts end: Ctrl+C and SIGTERM, output that is stuck, and output that fails."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from pika.adapters.blocking_connection import BlockingChannel

from tests.proxy import ACK, Proxy
from tests.scripts import (
    CONSUMERS,
    NEEDED,
    OTHERS,
    PRODUCERS,
    SCRIPTS,
    Script,
    Scripts,
    consumer,
    full_pipe,
    replaced,
    start,
)
from tools import ROOT, TIMEOUT, environment
from tools.broker import eventually, free_port

LOGS = [name for name in CONSUMERS if "logs" in name]  # they say on standard error that they wait
each_signal = pytest.mark.parametrize(
    "how", [signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name
)


def ends_at_once(script: Script, how: signal.Signals) -> None:
    """Stop a script: within a second, with the right status, and without another word."""
    complaints = len(script.err.seen)
    assert script.stop(how) < 1, str(script)
    is_consumer = str(script.path.relative_to(ROOT)) in CONSUMERS
    assert script.process.returncode == (0 if is_consumer else 128 + how)
    assert script.err.seen[complaints:] == []


@each_signal
def test_an_idle_consumer_ends_at_once(scripts: Scripts, how: signal.Signals) -> None:
    """Within a second, with nothing on standard error and exit status 0."""
    for script in [consumer(scripts, name) for name in CONSUMERS]:
        ends_at_once(script, how)


@each_signal
def test_a_consumer_that_waits_for_a_broker_ends_at_once(
    scripts: Scripts, how: signal.Signals
) -> None:
    """The same while there is no broker."""
    nobody = replaced(scripts.amqp_url, port=free_port())
    for script in [start(scripts, name, nobody) for name in CONSUMERS]:
        assert script.err.wait_for(bool, timeout=15)
        ends_at_once(script, how)
        assert len(script.err.seen) == 1


@each_signal
def test_a_task_in_hand_goes_back_to_its_queue(
    scripts: Scripts, channel: BlockingChannel, how: signal.Signals
) -> None:
    """A worker and a server that are stopped in the middle of their work end within a second, and
    others get what they had."""
    worker, server = (consumer(scripts, n) for n in ("work_queues/worker.py", "rpc/rpc_server.py"))
    scripts.run("work_queues/new_task.py", "a long task..........")
    client = scripts.start("rpc/rpc_client.py", "40", "--timeout", "60")
    worker.expect(" [x] Received 'a long task..........'")
    server.expect(" [.] fib(40)")
    for script in (server, worker):
        ends_at_once(script, how)

    def has_one_message(queue: str) -> bool:
        return bool(channel.queue_declare(queue, passive=True).method.message_count == 1)

    for queue in ("task_queue", "rpc_queue"):
        eventually(partial(has_one_message, queue), f"{queue} has it again")
    ends_at_once(client, how)


@each_signal
def test_a_producer_that_waits_for_the_broker_ends_at_once(
    scripts: Scripts, how: signal.Signals
) -> None:
    """A broker that hangs holds no script: it ends within a second, and has not said "Sent"."""
    with closing(Proxy(scripts.amqp_url, lambda *_: False)) as silent:
        producers = [start(scripts, name, silent.url) for name in PRODUCERS]
        eventually(lambda: silent.connections == len(PRODUCERS), "the scripts connect")
        for script in producers:
            ends_at_once(script, how)
            assert script.out.seen == []


@each_signal
def test_new_task_ends_at_once_while_it_waits_for_the_confirm(
    scripts: Scripts, how: signal.Signals
) -> None:
    """A task that is not confirmed is not reported as sent."""
    held: list[int] = []

    def watch(index: int, _to_broker: bool) -> bool:
        held.extend([index] * (index == ACK))
        return not held

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        script = scripts.start("work_queues/new_task.py", amqp_url=proxy.url)
        eventually(lambda: held, "the broker confirms the task")
        ends_at_once(script, how)
    assert script.out.seen == []


@each_signal
def test_a_script_that_waits_for_a_name_server_ends_at_once(
    scripts: Scripts, how: signal.Signals, tmp_path: Path
) -> None:
    """A name server that does not answer keeps no script from ending."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket, sys, time\n"
        "def ask(*_, **__):\n"
        "    time.sleep(0.2)  # until pika's thread waits for the answer\n"
        "    print('asking', file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
        "socket.getaddrinfo = ask\n"
    )
    with scripts.environment(PYTHONPATH=str(tmp_path)):
        asking = [start(scripts, name) for name in SCRIPTS if name != OTHERS[0]]  # it tells more
    for script in asking:
        script.expect_error("asking")
        ends_at_once(script, how)


@each_signal
def test_a_second_signal_that_follows_at_once_changes_nothing(
    scripts: Scripts, how: signal.Signals
) -> None:
    """An impatient second Ctrl+C, however soon after the first, makes no traceback."""
    with closing(Proxy(scripts.amqp_url, lambda *_: False)) as silent:
        producers = [start(scripts, name, silent.url) for name in PRODUCERS * 3]
        eventually(lambda: silent.connections == len(producers), "the scripts connect")
        for script in [*producers, *(consumer(scripts, name) for name in CONSUMERS)]:
            script.process.send_signal(how)
            ends_at_once(script, how)


def is_stuck(script: Script) -> bool:
    """Tell whether a thread of a script is in a system call about standard output."""
    calls = Path(f"/proc/{script.process.pid}/task").glob("*/syscall")
    return any(call.read_text().split()[1:2] == ["0x1"] for call in calls)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc to see a script stuck")
@each_signal
def test_a_script_whose_output_is_stuck_ends_at_once(scripts: Scripts, how: signal.Signals) -> None:
    """A full pipe that nobody reads keeps no script from ending."""
    serving = consumer(scripts, "rpc/rpc_server.py")
    with full_pipe() as stuck:
        running = {
            name: scripts.start(name, *NEEDED.get(name, []), stdout=stuck)
            for name in [*CONSUMERS, *PRODUCERS]
        }
        for name in LOGS:
            running[name].expect_error(CONSUMERS[name])
        for name in PRODUCERS[2:5]:
            start(scripts, name)
        for script in running.values():
            eventually(partial(is_stuck, script), f"{script} is stuck")
            ends_at_once(script, how)
    assert serving.process.poll() is None


def test_output_that_fails_is_one_line(scripts: Scripts) -> None:
    """A disk that is full, or an output that is closed, is one line, and exit status 1."""
    serving = consumer(scripts, "rpc/rpc_server.py")
    with open("/dev/full", "wb") as full:
        running = {
            name: scripts.start(name, *NEEDED.get(name, []), stdout=full.fileno())
            for name in [*CONSUMERS, *PRODUCERS]
        }
    for name in LOGS:
        running[name].expect_error(CONSUMERS[name])
    for name in PRODUCERS[2:5]:
        start(scripts, name)
    for name, script in running.items():
        assert script.wait() == 1, str(script)
        complaints = [line for line in script.err.seen if line != CONSUMERS.get(name)]
        assert complaints == [" [!] [Errno 28] No space left on device"]
    assert serving.process.poll() is None


def test_a_closed_output_is_one_line(scripts: Scripts) -> None:
    """What the shell writes as `>&-`: the script cannot print, and says so."""
    for name in SCRIPTS:
        command = ["bash", "-c", '"$@" >&-', "-", sys.executable, name, *NEEDED.get(name, [])]
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(scripts.amqp_url),
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert ended.returncode == 1
        assert ended.stderr == " [!] [Errno 9] Bad file descriptor\n"


@pytest.mark.parametrize(
    ("name", "queue"),
    [("work_queues/worker.py", "task_queue"), ("dead_letters/worker.py", "tasks")],
)
def test_a_worker_that_cannot_even_complain_ends(
    amqp_url: str, channel: BlockingChannel, name: str, queue: str
) -> None:
    """With `2>&1 | head -1`, both outputs are lost after one line. The worker ends, and the task
    that it had is in its queue again."""
    script = subprocess.Popen(
        [sys.executable, name],
        cwd=ROOT,
        env=environment(amqp_url),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert script.stdout
        with script.stdout:
            assert script.stdout.readline().decode() == f"{CONSUMERS[name]}\n"
        channel.confirm_delivery()
        channel.basic_publish("", queue, b"task", mandatory=True)
        assert script.wait(TIMEOUT) == 1
    finally:
        script.kill()
        script.wait()
    eventually(lambda: channel.basic_get(queue)[0], "the task is back")
