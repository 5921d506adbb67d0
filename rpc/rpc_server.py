"""Answer the requests in the queue 'rpc_queue' with Fibonacci numbers."""

import argparse
import os
import signal
import sys
import time

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPConnectionError, AMQPError
from pika.spec import Basic, BasicProperties

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


def fib(n: int) -> int:
    """Return the n-th Fibonacci number, slowly on purpose: it stands for expensive work."""
    return n if n < 2 else fib(n - 1) + fib(n - 2)


def answer(body: bytes) -> tuple[str, str]:
    """Return the type of the answer to a request, "result" or "error", and its text."""
    try:
        n = int(body)
    except ValueError:  # text, nothing, or bytes that are no text
        n = -1
    if not 0 <= n <= 35:
        return "error", "not a whole number from 0 to 35"
    print(f" [.] fib({n})")
    return "result", str(fib(n))


def on_request(
    channel: BlockingChannel, method: Basic.Deliver, request: BasicProperties, body: bytes
) -> None:
    if request.reply_to:  # without it, nobody waits for an answer
        kind, text = answer(body)
        channel.basic_publish(
            exchange="",
            routing_key=request.reply_to,
            body=text.encode(),
            properties=pika.BasicProperties(
                correlation_id=request.correlation_id, type=kind, content_type="text/plain"
            ),
        )
    # Last, so that another server gets the request if this one dies before.
    channel.basic_ack(method.delivery_tag)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()

    connection = connect()
    channel = connection.channel()
    channel.queue_declare("rpc_queue", durable=True)
    channel.basic_qos(prefetch_count=1)  # the next request goes to a server that is free
    # fib(35) takes seconds. Work that takes minutes needs a thread, as in work_queues/worker.py.
    channel.basic_consume("rpc_queue", on_request)
    print(" [x] Awaiting RPC requests")
    channel.start_consuming()
    connection.close()
    raise AMQPConnectionError("RabbitMQ cancelled the consumer")


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
