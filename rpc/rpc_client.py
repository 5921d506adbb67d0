"""Ask the servers on the queue 'rpc_queue' for Fibonacci numbers."""

import argparse
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections import deque
from contextlib import suppress

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends the script at once, as kill does

import pika
from pika.exceptions import AMQPConnectionError, AMQPError


def main():
    options = parser.parse_args()
    if not 0 < options.timeout < 1_000_000:
        parser.error("timeout must be more than 0 and less than 1000000 seconds")
    with FibonacciRpcClient() as client:
        for n in options.numbers:
            print(f" [x] Requesting fib({n})")
        for result in client.call_many(options.numbers, options.timeout):
            print(f" [.] Got {result}")


class FibonacciRpcClient:
    """A connection with one callback queue, which takes the answers to all calls.

    Use it in a `with` statement, and only in the thread and the process that made it. Its methods
    raise AMQPError if the connection is lost, as it is if you call none of them for a few minutes.
    """

    def __init__(self):
        self.connection = connect()
        self.channel = self.connection.channel()
        self.callback_queue = self.channel.queue_declare(queue="", exclusive=True).method.queue
        self.channel.basic_consume(self.callback_queue, self.on_answer, auto_ack=True)
        self.channel.add_on_return_callback(self.on_return)
        self.connection.add_on_connection_blocked_callback(self.on_blocked)
        self.connection.add_on_connection_unblocked_callback(self.on_blocked)
        self.blocked = False

    def call(self, n, timeout=10):
        """Return the n-th Fibonacci number. See call_many for the timeout and the errors."""
        return self.call_many([n], timeout)[0]

    def call_many(self, numbers, timeout=10):
        """Return the Fibonacci numbers of all these numbers, in the same order.

        Raises TimeoutError after so many seconds, and RpcError if an answer is no number.
        """
        deadline = time.monotonic() + timeout
        unsent = deque(numbers)
        self.waiting = {}  # what we have asked for and do not have yet, by correlation id
        self.answers = {}  # by correlation id, in the order of the requests
        while unsent or self.waiting:
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                raise TimeoutError(f"No answer within {timeout:g} s")
            if unsent and len(self.waiting) < IN_FLIGHT and not self.blocked:
                self.send(unsent.popleft(), seconds)
            else:
                self.connection.process_data_events(seconds)  # calls on_answer if one comes
            if self.channel.is_closed:
                raise self.channel._closing_reason  # why; pika has no public name for it
        return list(self.answers.values())

    def send(self, n, seconds):
        correlation_id = str(uuid.uuid4())
        self.waiting[correlation_id] = n
        self.answers[correlation_id] = None  # this keeps its place
        self.channel.basic_publish(
            exchange="",
            routing_key="rpc_queue",
            body=str(n).encode(),
            properties=pika.BasicProperties(
                reply_to=self.callback_queue,
                correlation_id=correlation_id,
                expiration=str(int(seconds * 1000)),  # after this time, RabbitMQ drops it
            ),
            mandatory=True,  # if there is no queue, the request comes back to on_return
        )

    def on_answer(self, channel, method, properties, body):
        if properties.correlation_id not in self.waiting:
            return  # this answer is late, or it is the second one to the same request
        n = self.waiting.pop(properties.correlation_id)
        if properties.type == "error" or not re.fullmatch(rb"\d{1,100}", body):
            text = body[:100].decode(errors="surrogateescape")
            raise RpcError(f"fib({n}): the server says {text!r}")
        self.answers[properties.correlation_id] = int(body)

    def on_return(self, channel, method, properties, body):
        if properties.correlation_id in self.waiting:
            raise RpcError("There is no queue 'rpc_queue': start a server")

    def on_blocked(self, connection, frame):
        # RabbitMQ, short of memory or disk space, stops reading from us, or goes on.
        self.blocked = isinstance(frame.method, pika.spec.Connection.Blocked)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        # close() waits for RabbitMQ, perhaps forever. So wait for close(), but only for a second.
        closing = threading.Thread(target=self.close, daemon=True)
        closing.start()
        closing.join(timeout=1)

    def close(self):
        with suppress(AMQPError):  # the connection is lost already
            self.connection.close()


class RpcError(AMQPError):
    """An answer is an error or no number, or there is no queue for the requests."""


IN_FLIGHT = 100  # how many requests may wait for their answers at the same time

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--timeout", type=float, default=10, metavar="SECONDS")
parser.add_argument("numbers", type=int, nargs="*", default=[30], metavar="N")


# --- From here on, all producers have the same code: see the end of lesson 1 (hello_world). ---


def connect():
    """Connect to the first RabbitMQ in AMQP_URL that accepts us. Raises AMQPConnectionError."""
    urls = os.getenv("AMQP_URL", "amqp://guest:guest@localhost:5672/%2F")
    try:
        urls.encode()  # raises an exception for bytes that are not UTF-8
        brokers = [pika.URLParameters(re.fullmatch(URL, u.strip())[0]) for u in urls.split(",")]
    except OSError as error:  # a file with certificates, for example
        raise AMQPConnectionError(f"AMQP_URL asks for what does not work: {error}") from None
    except Exception:  # do not print this exception: it may contain the password
        raise AMQPConnectionError(f"AMQP_URL must look like {EXAMPLE}") from None
    answers = []
    for broker in brokers:  # pika accepts a list, too, but gives up at a name it cannot resolve
        try:
            return pika.BlockingConnection(broker)
        except Exception as error:  # an error of pika, of the socket or of TLS
            cause = next((e.exception for e in error.args if hasattr(e, "exception")), error)
            answers.append(f"{broker.host}:{broker.port}: {cause}")
    raise AMQPConnectionError(f"No RabbitMQ accepts us: {'; '.join(answers)}")


URL = "amqps?://([^@/?#]*@)?[^@/?#:][^@/?#]*([/?][^@#]*)?"  # pika does not insist on a host
EXAMPLE = "amqp://user:password@host:5672/virtual_host"


if __name__ == "__main__":
    try:
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)
        main()
    except (AMQPError, OSError) as error:  # OSError if the output is closed or full, for example
        try:
            print(f" [!] {error}", file=sys.stderr)
        finally:
            os._exit(1)  # sys.exit would try to write the rest of the output, and may fail again
