"""The parts of the bench: each gives tables, and has what they need ready while they are taken."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial

from tools import ROOT, environment
from tools.bench.measure import Bench, Queue, Script, Table
from tools.broker import Cluster, Container, NoBroker

NEW_TASK = "work_queues/new_task.py"
NEW_TASKS = "publisher_confirms/new_tasks.py"
WORKER = "work_queues/worker.py"
CLIENTS = "tools/bench/clients"


# --- One run of each kind: it returns how many messages a second ---


def send_one_by_one(queue: Queue, count: int) -> float:
    """Run new_task.py once for each task."""
    queue.fresh()
    command, env = [sys.executable, NEW_TASK, "task 00000"], environment(queue.amqp_url)
    begin = time.perf_counter()
    for _ in range(count):
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    return count / (time.perf_counter() - begin)


def send(queue: Queue, window: int, count: int) -> float:
    """Give lines to new_tasks.py, which has sent one already; time them until it has ended."""
    queue.fresh()
    command = (NEW_TASKS, "--window", str(window))
    with Script(queue.amqp_url, *command, line=" [x] Sent") as script:
        assert script.stdin
        script.stdin.write(b"task 00000\n")
        script.stdin.flush()
        queue.wait_for(1)
        begin = time.perf_counter()
        with script.stdin:
            script.stdin.write(b"".join(b"task %05d\n" % i for i in range(count)))
        return count / (script.wait_for(1)[0] - begin)


def begin_to_end(amqp_url: str, script: str, count: int, *options: str) -> float:
    """Time a script from its line "Begin" to its line "End"."""
    with Script(amqp_url, f"{CLIENTS}/{script}.py", *options, line=" [.]") as started:
        begin, _ = started.wait_for(1)
        return count / (started.wait_for(2)[0] - begin)


def publish(queue: Queue, client: str, count: int, *options: str) -> float:
    """Publish with a client of another kind."""
    queue.fresh()
    options = ("publish", str(count), *options)
    return begin_to_end(queue.amqp_url, f"with_{client}", count, *options)


def call(amqp_url: str, count: int, in_flight: int, *options: str) -> float:
    """Call with the class FibonacciRpcClient."""
    return begin_to_end(amqp_url, "rpc_calls", count, str(count), str(in_flight), *options)


def work(queue: Queue, count: int, *command: str) -> float:
    """Fill the queue, and let a worker do the tasks; time from the first to the last one."""
    queue.fill(count)
    with Script(queue.amqp_url, *command, line=" [x] Done") as worker:
        begin, done = worker.wait_for(1)
        end, all_done = worker.wait_for(count)
        return max(all_done - done, 1) / (end - begin)  # few tasks may be done by now


# --- The parts ---


def publishing(bench: Bench) -> Iterator[Table]:
    n = bench.count
    with bench.queue("publishing") as queue:
        yield Table(
            "Publishing: what a confirm costs",
            "The tasks have 10 bytes and go to one classic queue. The first four ways use pika's "
            "`BlockingConnection`, and the tasks are persistent if the table does not say "
            '"transient". The next way is `new_task.py`, which needs a new process for each task. '
            "The last ones are `new_tasks.py`, which waits only when as many tasks as its window "
            "are unconfirmed.",
            "tasks/s",
            {
                "a confirm after each": partial(publish, queue, "pika", n(400), "confirmed"),
                "a confirm after each, transient": partial(
                    publish, queue, "pika", n(700), "confirmed", "transient"
                ),
                "no confirms": partial(publish, queue, "pika", n(15000)),
                "no confirms, transient": partial(publish, queue, "pika", n(15000), "transient"),
                "one process per task": partial(send_one_by_one, queue, n(4)),
                "window 1": partial(send, queue, 1, n(700)),
                "window 10": partial(send, queue, 10, n(4000)),
                "window 100": partial(send, queue, 100, n(15000)),
                "window 1000": partial(send, queue, 1000, n(25000)),
            },
        )


def working(bench: Bench) -> Iterator[Table]:
    counts = {
        "--prefetch 1": 1000,
        "--prefetch 10": 5000,
        "--prefetch 100": 15000,
        "--auto-ack --prefetch 0": 15000,
    }
    with ExitStack() as stack:
        queues = {kind: stack.enter_context(bench.queue(kind, kind)) for kind in bench.kinds}
        yield Table(
            "Working: what an acknowledgement costs",
            "Many tasks wait in the queue, and they need no work. One `worker.py` does them, and "
            "prints two lines for each task.",
            "tasks/s",
            {
                f"{kind} queue: {options}": partial(
                    work, queue, bench.count(count), WORKER, *options.split()
                )
                for kind, queue in queues.items()
                for options, count in counts.items()
            },
        )


def rpc(bench: Bench) -> Iterator[Table]:
    n = bench.count
    with ExitStack() as stack:

        def servers(number: int) -> str:
            """Start servers in a virtual host of their own, and return its URL."""
            url = stack.enter_context(bench.queue(f"rpc-{number}")).amqp_url
            for _ in range(number):
                server = Script(url, "rpc/rpc_server.py", line=" [x] Awaiting")
                stack.enter_context(server).wait_for(1)
            return url

        one, two = servers(1), servers(2)
        yield Table(
            "RPC: cheap calls",
            'The class `FibonacciRpcClient` asks `rpc_server.py` for fib(5). "10 in flight" means '
            "that up to 10 requests wait for their answers at the same time.",
            "calls/s",
            {
                "one at a time": partial(call, one, n(400), 1),
                "one at a time, a callback queue for each call": partial(
                    call, one, n(150), 1, "queue-per-call"
                ),
                "10 in flight": partial(call, one, n(1000), 10),
                "100 in flight": partial(call, one, n(1000), 100),
                "100 in flight, two servers": partial(call, two, n(1000), 100),
            },
        )


def cluster(bench: Bench) -> Iterator[Table]:
    if not isinstance(bench.broker, Container):
        raise NoBroker("The three nodes are containers, so the one beside them must be one, too")
    n = bench.count
    runs: dict[str, Callable[[Queue], float]] = {
        "publishing, --window 1": partial(send, window=1, count=n(400)),
        "publishing, --window 1000": partial(send, window=1000, count=n(8000)),
        "working, --prefetch 1": lambda queue: work(queue, n(400), WORKER),
        "working, --prefetch 100": lambda queue: work(queue, n(8000), WORKER, "--prefetch", "100"),
    }
    with closing(Cluster()) as nodes, ExitStack() as stack:
        nodes.start()
        places = {
            f"{place}, {kind} queue": stack.enter_context(where.queue(f"cluster-{kind}", kind))
            for place, where, kind in [
                ("one node", bench, "classic"),
                ("one node", bench, "quorum"),
                ("three nodes", Bench(nodes), "quorum"),
            ]
        }
        yield Table(
            "Three nodes beside one",
            "`new_tasks.py` and `worker.py`. Here all nodes share the processors of one machine.",
            "tasks/s",
            {
                f"{what}: {place}": partial(run, queue)
                for what, run in runs.items()
                for place, queue in places.items()
            },
        )


def clients(bench: Bench) -> Iterator[Table]:
    n = bench.count
    with bench.queue("clients") as queue:
        ways: dict[str, Callable[[], float]] = {
            "publishing: pika, BlockingConnection": partial(
                publish, queue, "pika", n(400), "confirmed"
            ),
            "publishing: amqpstorm": partial(publish, queue, "amqpstorm", n(60)),
            "publishing: kombu": partial(publish, queue, "kombu", n(700)),
            "publishing: aio-pika": partial(publish, queue, "aio_pika", n(500)),
            "publishing: aio-pika, window 100": partial(publish, queue, "aio_pika", n(3000), "100"),
            "publishing: new_tasks.py --window 100": partial(send, queue, 100, n(15000)),
        }
        for prefetch, count in (("1", n(600)), ("100", n(15000))):
            group = f"working, prefetch {prefetch}"
            ways[f"{group}: worker.py"] = partial(
                work, queue, count, WORKER, "--prefetch", prefetch
            )
            for client in ("amqpstorm", "kombu", "aio_pika"):
                ways[f"{group}: {client.replace('_', '-')}"] = partial(
                    work, queue, count, f"{CLIENTS}/with_{client}.py", "work", prefetch
                )
        yield Table(
            "Other clients",
            "The tasks have 10 bytes, and go to one classic queue. A task that is published is "
            "persistent, mandatory and confirmed. A worker has no work to do: it prints two lines "
            "for each task. `worker.py` acknowledges several tasks at once, and the others "
            "acknowledge each one. Each client has advantages that no table shows. aio-pika is for "
            "programs with asyncio, and reconnects by itself. In amqpstorm, any thread may use a "
            "channel, and a thread that waits for an answer looks for it every ten milliseconds. "
            "kombu also works with brokers other than RabbitMQ.",
            "tasks/s",
            ways,
        )


PARTS = {part.__name__: part for part in (publishing, working, rpc, cluster, clients)}
