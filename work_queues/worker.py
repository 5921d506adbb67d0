"""Do the tasks in the queue 'task_queue', one at a time: a second of work for each dot."""

import argparse
import os
import queue
import signal
import sys
import threading
import time
from functools import partial

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPConnectionError, AMQPError
from pika.spec import Basic, BasicProperties

Delivery = tuple[BlockingChannel, Basic.Deliver, BasicProperties, bytes]

AMQP_URL = "".join(os.getenv("AMQP_URL", "").split()) or "amqp://guest:guest@localhost:5672/%2F"


def connect() -> pika.BlockingConnection:
    """Connect to the node at AMQP_URL; of several, to the first that answers."""
    try:
        nodes = [pika.URLParameters(url) for url in AMQP_URL.replace(",amqp", " amqp").split()]
    except (ValueError, TypeError, LookupError, SyntaxError):  # not shown: it has a password
        sys.exit(" [!] AMQP_URL must look like amqp://user:password@host:5672/virtual_host")
    for node in nodes:  # pika does not go on to the next one if a name has no address
        try:
            return pika.BlockingConnection(node)
        except Exception as error:  # pika has a dozen for this, some of them the socket's
            why = str(error) or error.args[0].exception  # of a socket it is one level deeper
    raise AMQPConnectionError(f"Cannot connect to RabbitMQ: {why}")


def work(task: str) -> None:
    """Do a task: a second for each dot."""
    time.sleep(task.count("."))


def consume(channel: BlockingChannel, tasks: "queue.SimpleQueue[Delivery | Exception]") -> None:
    """Serve the connection until it is lost, and hand over the reason as if it were a task."""
    try:
        channel.start_consuming()
        channel.connection.close()
        raise AMQPConnectionError("RabbitMQ cancelled the consumer")
    except Exception as error:
        tasks.put(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefetch", type=int, default=1, metavar="N", help="0 is no limit")
    parser.add_argument("--auto-ack", action="store_true", help="RabbitMQ forgets a task it sends")
    parser.add_argument("--forget-ack", action="store_true", help="never acknowledge a task")
    options = parser.parse_args()
    if not 0 <= options.prefetch <= 65535:
        parser.error("argument --prefetch: must be from 0 to 65535")

    tasks: queue.SimpleQueue[Delivery | Exception] = queue.SimpleQueue()
    connection = connect()
    channel = connection.channel()
    channel.queue_declare("task_queue", durable=True)
    channel.basic_qos(prefetch_count=options.prefetch)
    channel.basic_consume("task_queue", lambda *d: tasks.put(d), auto_ack=options.auto_ack)
    print(" [*] Waiting for tasks. To exit press CTRL+C")
    # From here on the connection is the thread's: it answers heartbeats however long a task takes.
    threading.Thread(target=consume, args=(channel, tasks), daemon=True).start()

    while True:
        task = tasks.get()
        if isinstance(task, Exception):
            raise task
        _channel, method, _properties, body = task
        if channel.is_closed and not options.auto_ack:
            continue  # this task is in its queue again

        text = body.decode(errors="backslashreplace")
        again = " (redelivered)" if method.redelivered else ""
        print(f" [x] Received '{text}'{again}")
        work(text)
        print(" [x] Done")
        if channel.is_open and not options.auto_ack and not options.forget_ack:
            acknowledge = partial(channel.basic_ack, method.delivery_tag)
            connection.add_callback_threadsafe(acknowledge)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    said = ""
    while True:
        try:
            main()
        except AMQPConnectionError as error:
            if "ACCESS_REFUSED" in str(error) or "NOT_ALLOWED" in str(error):
                sys.exit(f" [!] {error}")  # a wrong password or virtual host stays wrong
            if said != str(error):
                print(f" [!] {error}; trying again every second", file=sys.stderr)
            said = str(error) if "Cannot connect" in str(error) else ""  # once, not every second
        except (AMQPError, OSError) as error:
            sys.exit(f" [!] {error}")
        time.sleep(1)
