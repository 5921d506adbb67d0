"""The parts of the bench: each gives tables, and has what they need ready while they are taken."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial

from tools import ROOT, environment
from tools.bench.measure import Bench, Counted, Queue, Table
from tools.broker import Cluster, Container, NoBroker

Part = Callable[[Bench], Iterator[Table]]

NEW_TASK = "work_queues/new_task.py"
NEW_TASKS = "publisher_confirms/new_tasks.py"
WORKER = "work_queues/worker.py"
PLAIN = "tools/bench/plain.py"
TASK = b"task %05d\n"  # ten bytes and the end of the line


# --- One run of each kind: it returns how many messages a second ---


def send_one_by_one(queue: Queue, count: int) -> float:
    """Run new_task.py once for each task."""
    queue.fresh()
    command = [sys.executable, NEW_TASK, "task 00000"]
    begin = time.perf_counter()
    for _ in range(count):
        subprocess.run(
            command, cwd=ROOT, env=environment(queue.amqp_url), check=True, capture_output=True
        )
    return count / (time.perf_counter() - begin)


def send(queue: Queue, window: int, count: int, lines: bytes = b"", fresh: bool = True) -> float:
    """Give lines to new_tasks.py, which has sent one already; time them until it has ended."""
    if fresh:
        queue.fresh()
    before = queue.ready()
    lines = lines or b"".join(TASK % i for i in range(count))
    command = (NEW_TASKS, "--window", str(window))
    with Counted(queue.amqp_url, *command, line=" [x] Sent", feed=True) as script:
        script.feed(TASK % 0)
        queue.wait_for(before + 1)
        begin = time.perf_counter()
        script.feed(lines)
        script.end_of_lines()
        return count / (script.wait_for(1)[0] - begin)


def send_plainly(queue: Queue, count: int, *options: str) -> float:
    """Publish with plain.py."""
    queue.fresh()
    with Counted(queue.amqp_url, PLAIN, str(count), *options, line=" [.]") as script:
        begin, _ = script.wait_for(1)
        return count / (script.wait_for(2)[0] - begin)


def work(
    queue: Queue,
    count: int,
    *options: str,
    command: tuple[str, ...] = (WORKER,),
    fill: bool = True,
) -> float:
    """Fill the queue, and let a worker do the tasks; time from the first to the last one."""
    if fill:
        queue.fill(count)
    with Counted(queue.amqp_url, *command, *options, line=" [x] Done") as worker:
        begin, done = worker.wait_for(1)
        end, all_done = worker.wait_for(count)
        return max(all_done - done, 1) / (end - begin)  # few tasks may be done by now


def call(amqp_url: str, n: int, count: int, *options: str) -> float:
    """Call fib(n) with the class FibonacciRpcClient."""
    command = ("-m", "tools.bench.calls", str(n), str(count), *options)
    with Counted(amqp_url, *command, line=" [.]") as client:
        begin, _ = client.wait_for(1)
        return count / (client.wait_for(2)[0] - begin)


def log(amqp_url: str, receivers: list[Counted], count: int) -> float:
    """Publish log lines, and time until each receiver has printed all of them."""
    before = [receiver.count() for receiver in receivers]
    with Counted(amqp_url, PLAIN, str(count), "--exchange", "logs", line=" [.]") as emitter:
        begin, _ = emitter.wait_for(1)
        ends = [r.wait_for(b + count)[0] for r, b in zip(receivers, before, strict=True)]
        return count / (max(ends) - begin)


# --- The parts ---


def publishing(bench: Bench) -> Iterator[Table]:
    with bench.queue("publishing") as queue:
        n = bench.count
        yield Table(
            "publishing",
            "Publishing: what a confirm costs",
            "The tasks are persistent, have 10 bytes, and go to one classic queue. `new_task.py` "
            "needs a new process for each task. `new_tasks.py` waits only when as many tasks as "
            "its window are unconfirmed. The other ways use pika's BlockingConnection.",
            "tasks/s",
            {
                "BlockingConnection, a confirm after each": partial(
                    send_plainly, queue, n(400), "--confirm"
                ),
                "new_task.py, one process a task": partial(send_one_by_one, queue, n(4, 2)),
                "new_tasks.py --window 1": partial(send, queue, 1, n(700)),
                "new_tasks.py --window 10": partial(send, queue, 10, n(4000)),
                "new_tasks.py --window 100": partial(send, queue, 100, n(15000)),
                "new_tasks.py --window 1000": partial(send, queue, 1000, n(25000)),
                "BlockingConnection, no confirms": partial(send_plainly, queue, n(15000)),
            },
        )
        yield Table(
            "persistence",
            "Publishing: persistent and transient",
            "Messages of 10 bytes to one classic queue, with a BlockingConnection.",
            "messages/s",
            {
                "persistent, a confirm after each": partial(
                    send_plainly, queue, n(400), "--confirm"
                ),
                "transient, a confirm after each": partial(
                    send_plainly, queue, n(700), "--confirm", "--transient"
                ),
                "persistent, no confirms": partial(send_plainly, queue, n(15000)),
                "transient, no confirms": partial(send_plainly, queue, n(15000), "--transient"),
            },
            group=2,
        )

        def lines(size: int, count: int) -> bytes:
            return (b"x" * size + b"\n") * count

        sizes = {
            (size, window): n(count)
            for size, window, count in [
                (10, 1, 700),
                (1000, 1, 700),
                (100_000, 1, 200),
                (10, 1000, 25000),
                (1000, 1000, 15000),
                (100_000, 1000, 400),
            ]
        }
        names = {10: "10 bytes", 1000: "1 kB", 100_000: "100 kB"}
        yield Table(
            "size",
            "Publishing: how large the tasks are",
            "Persistent tasks to one classic queue, with `new_tasks.py`.",
            "tasks/s",
            {
                f"{names[size]}, --window {window}": partial(
                    send, queue, window, count, lines(size, count)
                )
                for (size, window), count in sizes.items()
            },
            group=3,
        )


def working(bench: Bench) -> Iterator[Table]:
    counts = {
        "--prefetch 1": 700,
        "--in-callback": 700,
        "--prefetch 10": 2500,
        "--prefetch 100": 2500,
        "--prefetch 0": 2500,
        "--auto-ack --prefetch 0": 4000,
    }
    with ExitStack() as stack:
        queues = {kind: stack.enter_context(bench.queue(kind, kind)) for kind in bench.kinds()}
        yield Table(
            "working",
            "Working: what an acknowledgement costs",
            "Many tasks wait in the queue, and they need no work. One `worker.py` does them, and "
            "prints two lines for each task. With `--in-callback`, the prefetch is 1.",
            "tasks/s",
            {
                f"{kind} queue, {options}": partial(
                    work, queue, bench.count(count), *options.split()
                )
                for kind, queue in queues.items()
                for options, count in counts.items()
            },
        )


def rpc(bench: Bench) -> Iterator[Table]:
    n = bench.count
    with ExitStack() as stack:

        def servers(kind: str, number: int) -> str:
            """Start servers in a virtual host of their own, and return its URL."""
            url = stack.enter_context(bench.virtual_host(f"rpc-{kind}-{number}", kind))
            for _ in range(number):
                server = stack.enter_context(
                    Counted(url, "rpc/rpc_server.py", line=" [x] Awaiting")
                )
                server.wait_for(1)
            return url

        one, two = servers("classic", 1), servers("classic", 2)
        ways: dict[str, Callable[[], float]] = {
            "one at a time": partial(call, one, 5, n(400)),
            "one at a time, a callback queue for each call": partial(
                call, one, 5, n(150), "--queue-per-call"
            ),
            "10 in flight": partial(call, one, 5, n(1000), "--in-flight", "10"),
            "100 in flight": partial(call, one, 5, n(1000), "--in-flight", "100"),
            "100 in flight, two servers": partial(call, two, 5, n(1000), "--in-flight", "100"),
        }
        if "quorum" in bench.kinds():
            url = servers("quorum", 1)
            ways["one at a time, rpc_queue a quorum queue"] = partial(call, url, 5, n(300))
        yield Table(
            "rpc",
            "RPC: cheap calls",
            'The class `FibonacciRpcClient` asks `rpc_server.py` for fib(5). "10 in flight" means '
            "that up to 10 requests wait for their answers at the same time.",
            "calls/s",
            ways,
        )
        yield Table(
            "rpc-expensive",
            "RPC: expensive calls",
            "The same for fib(25), which takes a processor about 20 milliseconds. Up to 10 "
            "requests wait for their answers.",
            "calls/s",
            {
                "one server": partial(call, one, 25, n(40), "--in-flight", "10"),
                "two servers": partial(call, two, 25, n(80), "--in-flight", "10"),
            },
        )


def logs(bench: Bench) -> Iterator[Table]:
    with ExitStack() as stack:
        ways: dict[str, Callable[[], float]] = {}
        for number, count in ((1, 5000), (2, 3000), (4, 1500), (8, 800)):
            url = stack.enter_context(bench.virtual_host(f"logs-{number}"))
            command = (url, "publish_subscribe/receive_logs.py")
            receivers = [stack.enter_context(Counted(*command, line=" [")) for _ in range(number)]
            for receiver in receivers:
                receiver.wait_for(1)  # it waits for logs
            name = f"{number} receiver" + "s" * (number > 1)
            ways[name] = partial(log, url, receivers, bench.count(count))
        yield Table(
            "logs",
            "Logs: one emitter, several receivers",
            "One BlockingConnection sends log lines to the exchange `logs`. The time ends when "
            "each `receive_logs.py` has printed all of them.",
            "lines/s",
            ways,
        )


def growth(bench: Bench) -> Iterator[Table]:
    """How it grows."""
    n = bench.count
    memory = {"RabbitMQ, no tasks": bench.memory()}
    with ExitStack() as stack:
        ways: dict[str, Callable[[], float]] = {}
        for level in (1000, 100_000, 1_000_000):
            queue = stack.enter_context(bench.queue(f"growth-{level}"))
            count = n(level, 30)
            with Counted(queue.amqp_url, NEW_TASKS, line=" [x] Sent", feed=True) as script:
                for i in range(0, count, 1000):
                    script.feed(b"".join(TASK % j for j in range(i, min(i + 1000, count))))
                queue.wait_for(count)
                memory[f"new_tasks.py, {level:,} tasks sent"] = script.peak_memory()
            memory[f"RabbitMQ, with {level:,} more tasks"] = bench.memory()
            ways[f"publishing, {level:,} tasks in the queue"] = partial(
                send, queue, 1000, n(15000), fresh=False
            )
            options = ("--prefetch", "100")
            ways[f"working, {level:,} tasks in the queue"] = partial(
                work, queue, n(1500), *options, fill=False
            )
        yield Table(
            "growth",
            "How it grows: tasks in the queue",
            "`new_tasks.py --window 1000` and `worker.py --prefetch 100`, with a classic queue in "
            "which some tasks already wait. The first column says how many.",
            "tasks/s",
            dict(sorted(ways.items(), key=lambda way: way[0].split(", ")[0])),
            group=3,
        )
        yield Table(
            "memory",
            "How it grows: memory",
            "For the script: the largest amount of memory that it used. For RabbitMQ: the amount "
            "that RabbitMQ itself reports.",
            "MB",
            {name: partial(float, value) for name, value in memory.items()},
            runs=1,
        )


def cluster(bench: Bench) -> Iterator[Table]:
    """Three nodes."""
    if not isinstance(bench.broker, Container):
        raise NoBroker("The three nodes are containers, so the one beside them must be one, too")
    n = bench.count
    with closing(Cluster()) as nodes, ExitStack() as stack:
        nodes.start()
        ways: dict[str, Callable[[], float]] = {}
        places = (
            ("one node, classic queue", bench, "classic"),
            ("one node, quorum queue", bench, "quorum"),
            ("three nodes, quorum queue", Bench(nodes), "quorum"),
        )
        for place, where, kind in places:
            queue = stack.enter_context(where.queue(f"cluster-{kind}", kind))
            ways[f"publishing, --window 1, {place}"] = partial(send, queue, 1, n(400))
            ways[f"publishing, --window 1000, {place}"] = partial(send, queue, 1000, n(8000))
            ways[f"working, --prefetch 1, {place}"] = partial(work, queue, n(400))
            ways[f"working, --prefetch 100, {place}"] = partial(
                work, queue, n(1500), "--prefetch", "100"
            )
        yield Table(
            "cluster",
            "Three nodes beside one",
            "`new_tasks.py` and `worker.py`. Here all nodes share the processors of one machine.",
            "tasks/s",
            dict(sorted(ways.items(), key=lambda way: way[0].split(", ")[:2])),
            group=3,
        )


PARTS: dict[str, Part] = {
    part.__name__: part for part in (publishing, working, rpc, logs, growth, cluster)
}
