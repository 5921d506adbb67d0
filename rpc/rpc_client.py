"""Ask the servers on the queue 'rpc_queue' for Fibonacci numbers, for all of them at once."""

import argparse
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence

import pika
from pika.exceptions import AMQPConnectionError, AMQPError
from pika.spec import BasicProperties

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


class RpcError(AMQPError):
    """A server answered with an error, or there has never been a server."""


class FibonacciRpcClient:
    """A connection, and one callback queue for the answers to all of its calls.

    It is a context manager, for one thread. Each method raises AMQPError when the connection is
    lost: also because nothing was called for longer than the heartbeat.
    """

    def __init__(self) -> None:
        self.waiting: set[str] = set()  # the correlation ids of the requests without an answer
        self.answers: dict[str, tuple[str | None, bytes]] = {}  # by correlation id
        self.connection = connect()
        self.channel = self.connection.channel()
        self.callback_queue = self.channel.queue_declare("", exclusive=True).method.queue
        self.channel.basic_consume(self.callback_queue, self.on_answer, auto_ack=True)
        self.channel.add_on_return_callback(self.on_return)

    def __enter__(self) -> "FibonacciRpcClient":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error in (None, RpcError):  # otherwise the broker may not answer to this, either
            self.connection.close()

    def on_answer(self, _c: object, _m: object, answer: BasicProperties, body: bytes) -> None:
        if answer.correlation_id in self.waiting:  # not a second answer, nor another's
            self.waiting.remove(answer.correlation_id)
            self.answers[answer.correlation_id] = answer.type, body

    def on_return(self, _c: object, _m: object, request: BasicProperties, _body: bytes) -> None:
        request.type = "error"  # as if a server had answered so
        self.on_answer(_c, _m, request, b"there is no queue 'rpc_queue': start a server")

    def call(self, n: int, timeout: float = 10) -> int:
        """Return the n-th Fibonacci number; timeout and errors are those of call_many."""
        return self.call_many([n], timeout)[0]

    def call_many(self, numbers: Sequence[int], timeout: float = 10) -> list[int]:
        """Return the Fibonacci numbers of all these numbers, in this order.

        All requests are sent at once, and timeout, in seconds, is for all of them together. Raises
        TimeoutError when it is over, RpcError for the first error in the answers.
        """
        if not 0 < timeout < 2**32 / 1000:  # RabbitMQ takes no longer expiration
            raise ValueError("timeout must be more than 0 and less than 4294967 seconds")
        deadline = time.monotonic() + timeout
        requests = [str(uuid.uuid4()) for _ in numbers]
        self.answers = {}
        self.waiting = set(requests)
        for request, n in zip(requests, numbers, strict=True):
            self.channel.basic_publish(
                exchange="",
                routing_key="rpc_queue",
                body=str(n).encode(),
                properties=pika.BasicProperties(
                    reply_to=self.callback_queue,
                    correlation_id=request,
                    expiration=str(int(timeout * 1000)),  # not computed if it still waits then
                    content_type="text/plain",
                ),
                mandatory=True,  # a request that reaches no queue is returned
            )
        while self.waiting:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"No answer within {timeout:g} s")
            self.connection.process_data_events(remaining)
            if self.channel.is_closed:
                raise AMQPConnectionError("RabbitMQ refused a request, and closed the channel")

        results = []
        for request, n in zip(requests, numbers, strict=True):
            kind, body = self.answers[request]
            if kind == "error" or not body.isdigit():
                raise RpcError(f"fib({n}): {body.decode(errors='backslashreplace')}")
            results.append(int(body))
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timeout", type=float, default=10, metavar="SECONDS")
    parser.add_argument("numbers", type=int, nargs="*", default=[30], metavar="N")
    options = parser.parse_args()

    with FibonacciRpcClient() as client:
        for n in options.numbers:
            print(f" [x] Requesting fib({n})")
        try:
            for result in client.call_many(options.numbers, options.timeout):
                print(f" [.] Got {result}")
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main()
    except (AMQPError, OSError) as error:
        sys.exit(f" [!] {error}")
