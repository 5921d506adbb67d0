"""Other clients for Python, each in a short script of its own, at the same guarantees.

Each script is called as `publish COUNT` or `work PREFETCH`. Tasks are persistent and mandatory, and
count when they are confirmed; a worker acknowledges a task when it is done, and prints two lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

from tools.bench.measure import Bench, Counted, Queue, Table
from tools.bench.parts import send, send_plainly, work
from tools.broker import NoBroker

CLIENTS = ("aio_pika", "amqpstorm", "celery", "faststream", "kombu")
FOLDER = "tools/bench/alternatives"


def publish(queue: Queue, script: str, count: int, *options: str) -> float:
    """Time from its first line to its second one."""
    queue.fresh()
    with Counted(
        queue.amqp_url, f"{FOLDER}/{script}", "publish", str(count), *options, line=" [.]"
    ) as publisher:
        begin, _ = publisher.wait_for(1)
        return count / (publisher.wait_for(2)[0] - begin)


def alternatives(bench: Bench) -> Iterator[Table]:
    """Give the tables for publishing and for working."""
    for module in CLIENTS:
        if find_spec(module) is None:
            raise NoBroker(f"{module} is not installed: pip install '.[alternatives]'")
    n = bench.count
    with bench.queue("alternatives") as queue:
        yield Table(
            "alternatives-publishing",
            "Other clients: publishing",
            "The tasks are persistent, mandatory and confirmed, have 10 bytes, and go to one "
            "classic queue. (Celery's tasks have their own format.) Each client has advantages "
            "that no table shows. aio-pika and FastStream are for programs with asyncio, and "
            "reconnect by themselves. FastStream also checks that the data in a message have the "
            "right types. In amqpstorm, any thread may use a channel. kombu also works with "
            "brokers other than RabbitMQ. Celery is a complete system, with retries, schedules "
            "and results. It starts one process for each processor.",
            "tasks/s",
            {
                "pika, BlockingConnection": partial(send_plainly, queue, n(400), "--confirm"),
                "amqpstorm": partial(publish, queue, "with_amqpstorm.py", n(60)),
                "kombu": partial(publish, queue, "with_kombu.py", n(700)),
                "celery": partial(publish, queue, "with_celery.py", n(300)),
                "aio-pika, one at a time": partial(publish, queue, "with_aio_pika.py", n(500)),
                "faststream, one at a time": partial(publish, queue, "with_faststream.py", n(300)),
                "aio-pika, window 100": partial(publish, queue, "with_aio_pika.py", n(3000), "100"),
                "new_tasks.py --window 100": partial(send, queue, 100, n(15000)),
            },
        )

        def other(script: str, prefetch: int) -> Callable[[], float]:
            def run() -> float:
                count = n(600 if prefetch == 1 else 1500)
                command = (f"{FOLDER}/{script}", "work", str(prefetch))
                if "celery" in script:  # its tasks have a form of their own
                    publish(queue, script, count)
                    return work(queue, count, command=command, fill=False)
                return work(queue, count, command=command)

            return run

        for prefetch in (1, 100):
            count = n(600 if prefetch == 1 else 1500)
            ways: dict[str, Callable[[], float]] = {
                "worker.py": partial(work, queue, count, "--prefetch", str(prefetch)),
                "worker.py --in-callback": partial(
                    work, queue, count, "--prefetch", str(prefetch), "--in-callback"
                ),
            }
            for name in CLIENTS:
                ways[name.replace("_", "-")] = other(f"with_{name}.py", prefetch)
            yield Table(
                f"alternatives-working-{prefetch}",
                f"Other clients: working with a prefetch of {prefetch}",
                "The workers get tasks without any work from one classic queue, and acknowledge "
                "each task when it is done.",
                "tasks/s",
                ways,
            )
