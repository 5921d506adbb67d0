"""How all scripts end: Ctrl+C and SIGTERM, output that is stuck, and output that fails."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import Connection

from tests.proxy import ACK, Proxy, Watch, without
from tests.scripts import (
    CONSUMERS,
    EMIT_LOG,
    FILE_WORKER,
    LOGS_WAITING,
    LOST,
    NEW_TASK,
    NEW_TASKS,
    RECEIVE,
    RECEIVE_LOGS,
    RPC_CLIENT,
    RPC_SERVER,
    SEND,
    SHAPES,
    WORKER,
    Script,
    Scripts,
    consumer,
    each_signal,
    full_pipe,
    put,
    received,
    size,
)
from tools import ROOT, environment
from tools.broker import eventually

STOPPED = " [!] Stopped. 0 tasks are confirmed. Go on from line 1"


def ends_at_once(script: Script, how: signal.Signals) -> None:
    """Stop a script: within a second, with the right status, and without another word. A shell
    shows a producer's as 130 or 143: it ends by the signal itself."""
    complaints = len(script.err.seen)
    assert script.stop(how) < 2, str(script)  # a second, or a little more if this machine is busy
    is_consumer = str(script.path.relative_to(ROOT)) in CONSUMERS
    assert script.process.returncode == (0 if is_consumer else -how)
    assert script.err.seen[complaints:] == []


def in_bash(scripts: Scripts, command: str, name: str, amqp_url: str = "") -> Script:
    """Run a script, which is "$@", as a command of a shell does."""
    words = ["bash", "-c", command, "-", sys.executable, name]
    return scripts.start_command(words, environment(amqp_url or scripts.amqp_url))


@each_signal
@pytest.mark.parametrize("signals", [1, 2])
def test_an_idle_consumer_ends_at_once(scripts: Scripts, how: signal.Signals, signals: int) -> None:
    """Within a second, with nothing on standard error and exit status 0. An impatient second
    Ctrl+C, however soon after the first, makes no traceback."""
    for script in [consumer(scripts, name) for name in SHAPES if name in CONSUMERS]:
        if signals == 2:
            script.process.send_signal(how)
        ends_at_once(script, how)


@each_signal
def test_a_consumer_that_waits_for_a_broker_ends_at_once(
    scripts: Scripts, how: signal.Signals
) -> None:
    """The same while there is no broker."""
    script = scripts.start(RECEIVE, amqp_url="amqp://localhost:1")
    script.expect_error(LOST)
    ends_at_once(script, how)


IMPORTING = """
import sys, time
print("it waits", file=sys.stderr, flush=True)
time.sleep(60)
"""
ASKING = """
import socket, sys, time
def ask(*_, **__):
    time.sleep(0.2)  # until pika's thread waits for the answer
    print("it waits", file=sys.stderr, flush=True)
    time.sleep(60)
socket.getaddrinfo = ask
"""


@each_signal
@pytest.mark.parametrize(
    ("module", "source"),
    [("pika", IMPORTING), ("sitecustomize", ASKING)],
    ids=["imports pika", "asks a name server"],
)
def test_a_script_that_is_still_starting_ends_at_once(
    scripts: Scripts, how: signal.Signals, tmp_path: Path, module: str, source: str
) -> None:
    """Ctrl+C works from the first moment, also while pika is imported, which takes a while, and
    while a name server does not answer."""
    (tmp_path / f"{module}.py").write_text(source)
    with scripts.environment(PYTHONPATH=str(tmp_path)):
        starting = scripts.launch(SEND, RECEIVE)
    for script in starting.values():
        script.expect_error("it waits")
        ends_at_once(script, how)


@each_signal
def test_a_task_in_hand_goes_back_to_its_queue(
    scripts: Scripts, channel: BlockingChannel, how: signal.Signals
) -> None:
    """A worker and a server that are stopped in the middle of their work end within a second, and
    others get what they had."""
    worker, server = (consumer(scripts, name) for name in (WORKER, RPC_SERVER))
    scripts.run(NEW_TASK, "a long task..........")
    client = scripts.start(RPC_CLIENT, "40", "--timeout", "60")
    worker.expect(received("a long task.........."))
    server.expect(" [.] fib(40)")
    for script in (server, worker):
        ends_at_once(script, how)
    for queue in ("task_queue", "rpc_queue"):
        eventually(lambda queue=queue: size(channel, queue) == 1, f"{queue} has it again")  # type: ignore[misc]
    ends_at_once(client, how)


@each_signal
@pytest.mark.parametrize(
    ("names", "watch", "held"),
    [
        ([SEND, RPC_CLIENT], lambda *_: False, Connection.Start.INDEX),
        ([NEW_TASK], without(ACK), ACK),
    ],
    ids=["connection", "confirm"],
)
def test_a_producer_that_waits_for_the_broker_ends_at_once(
    scripts: Scripts, how: signal.Signals, names: list[str], watch: Watch, held: int
) -> None:
    """A broker that hangs holds no script: it ends within a second, and has not said "Sent". A
    second signal that follows at once changes nothing."""
    with closing(Proxy(scripts.amqp_url, watch)) as silent:
        producers = scripts.launch(*names, amqp_url=silent.url).values()
        eventually(lambda: silent.to_client[held] == len(names), "the scripts wait")
        for script in producers:
            script.process.send_signal(how)
            ends_at_once(script, how)
            assert script.out.seen == []


@pytest.mark.parametrize("name", [SEND, RPC_CLIENT, NEW_TASKS])
def test_ctrl_c_ends_the_loop_of_a_shell(scripts: Scripts, name: str) -> None:
    """With `for … do python send.py; done`, Ctrl+C does not start the next send.py: bash sees that
    the script has ended by the signal, which came to both, and ends, too."""
    loop = 'for i in 1 2 3; do "$@"; done; echo not interrupted'
    with closing(Proxy(scripts.amqp_url, lambda *_: False)) as silent:
        shell = in_bash(scripts, loop, name, silent.url)
        eventually(lambda: silent.connections, "the first script connects")
        os.killpg(shell.process.pid, signal.SIGINT)  # as a terminal does
        assert shell.wait() == -signal.SIGINT
        assert silent.connections == 1
    assert shell.out.seen == []
    assert shell.err.seen == [STOPPED] * (name == NEW_TASKS)


# --- Output ---


def is_stuck(script: Script) -> bool:
    """Tell whether a thread of a script is in a system call about standard output."""
    calls = Path(f"/proc/{script.process.pid}/task").glob("*/syscall")
    return any(call.read_text().split()[1:2] == ["0x1"] for call in calls)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc to see a script stuck")
def test_a_script_whose_output_is_stuck_ends_at_once(scripts: Scripts) -> None:
    """A full pipe that nobody reads keeps no script from ending."""
    serving = consumer(scripts, RPC_SERVER)
    with full_pipe() as stuck:
        running = scripts.launch(*SHAPES, stdout=stuck)
        running[RECEIVE_LOGS].expect_error(LOGS_WAITING)
        scripts.run(EMIT_LOG)
        for script in running.values():
            eventually(partial(is_stuck, script), f"{script} is stuck")
            ends_at_once(script, signal.SIGINT)
    assert serving.process.poll() is None


def test_output_that_fails_is_one_line(scripts: Scripts) -> None:
    """A disk that is full, or an output that is closed, is one line, and exit status 1."""
    serving = consumer(scripts, RPC_SERVER)
    with open("/dev/full", "wb") as full:
        running = scripts.launch(*SHAPES, stdout=full.fileno())
    running[RECEIVE_LOGS].expect_error(LOGS_WAITING)
    scripts.run(EMIT_LOG)
    for script in running.values():
        assert script.wait() == 1, str(script)
        complaints = [line for line in script.err.seen if line != LOGS_WAITING]
        assert complaints == [" [!] [Errno 28] No space left on device"]
    assert serving.process.poll() is None


@pytest.mark.parametrize(
    ("redirection", "told"),
    [
        (">&-", [" [!] [Errno 9] Bad file descriptor"]),
        (">&- 2>&-", []),
        (">/dev/full 2>&1", []),
        (">/dev/full 2>&-", []),
    ],
)
def test_whatever_is_wrong_with_the_output_the_status_says_so(
    scripts: Scripts, redirection: str, told: list[str]
) -> None:
    """Standard output closed, both closed, both on a full disk: the exit status is 1."""
    for name in (RECEIVE, SEND):
        ended = in_bash(scripts, f'"$@" {redirection}', name)
        assert ended.wait() == 1
        assert ended.err.seen == told


def test_a_file_has_only_log_lines_also_if_standard_error_is_closed(
    scripts: Scripts, tmp_path: Path
) -> None:
    """With `2>&- > file`, "Waiting" and errors go nowhere, not into the file."""
    file = tmp_path / "logs"
    with closing(Proxy(scripts.amqp_url)) as proxy:
        in_bash(scripts, f'exec "$@" 2>&- >{file}', RECEIVE_LOGS, proxy.url)

        def log_comes(line: str) -> bool:
            scripts.run(EMIT_LOG, line)
            return line in file.read_text()

        eventually(lambda: log_comes("before"), "the receiver writes")
        proxy.cut()
        eventually(lambda: log_comes("after"), "it writes again")
    assert set(file.read_text().splitlines()) == {" [x] before", " [x] after"}


@pytest.mark.parametrize(("name", "queue"), [(WORKER, "task_queue"), (FILE_WORKER, "tasks")])
def test_a_worker_that_cannot_even_complain_ends(
    scripts: Scripts, channel: BlockingChannel, name: str, queue: str
) -> None:
    """With `2>&1 | head -1`, both outputs are lost after one line. The worker ends, and the task
    that it had is in its queue again."""
    shell = in_bash(scripts, '"$@" 2>&1 | head -1; echo ${PIPESTATUS[0]}', name)
    shell.expect(CONSUMERS[name])
    put(channel, queue, "task")
    shell.wait()
    assert shell.out.seen == [CONSUMERS[name], "1"]
    eventually(lambda: channel.basic_get(queue)[0], "the task is back")
