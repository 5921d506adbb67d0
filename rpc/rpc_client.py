"""Ask the servers on the queue 'rpc_queue' for Fibonacci numbers."""

import argparse
import os
import re
import signal
import sys
import threading
import time
import uuid
from contextlib import suppress

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends the script at once, as kill does

import pika
from pika.exceptions import AMQPConnectionError, AMQPError

IN_FLIGHT = 100  # how many requests may wait for their answers at the same time


class RpcError(AMQPError):
    """The server answered with an error or with nonsense, or there is no queue 'rpc_queue'."""


class FibonacciRpcClient:
    """A connection with one callback queue, which takes the answers to all calls.

    Use it in a `with` statement and in one thread only. Its methods raise AMQPError when the
    connection is lost. This also happens if you call no method for a few minutes: the client sends
    no heartbeats then, so RabbitMQ closes the connection.
    """

    def __init__(self):
        self.connection = connect()
        self.connection.add_on_connection_blocked_callback(self.on_blocked)
        self.connection.add_on_connection_unblocked_callback(self.on_unblocked)
        self.blocked = False  # whether RabbitMQ, short of memory or disk, reads nothing from us
        self.channel = self.connection.channel()
        self.channel.add_on_return_callback(self.on_return)
        self.callback_queue = self.channel.queue_declare(queue="", exclusive=True).method.queue
        self.channel.basic_consume(
            queue=self.callback_queue, on_message_callback=self.on_answer, auto_ack=True
        )

    def call(self, n, timeout=10):
        """Return the n-th Fibonacci number. See call_many for the timeout and the errors."""
        return self.call_many([n], timeout)[0]

    def call_many(self, numbers, timeout=10):
        """Return the Fibonacci numbers of all these numbers, in the same order.

        The timeout, in seconds, is for the whole call. Raises TimeoutError when this time is over,
        and RpcError if an answer is an error or nonsense.
        """
        if not 0 < timeout < 2**32 / 1000:  # an expiration has 32 bits, in ms
            raise ValueError("timeout must be more than 0 and less than 4294967 seconds")
        deadline = time.monotonic() + timeout
        requests = [(str(uuid.uuid4()), n) for n in numbers]  # each with its correlation id
        self.answers = {}  # by correlation id
        self.waiting = set()  # the correlation ids of the requests without an answer
        sent = 0
        while len(self.answers) < len(requests):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"No answer within {timeout:g} s")
            if sent < len(requests) and len(self.waiting) < IN_FLIGHT and not self.blocked:
                correlation_id, n = requests[sent]
                self.send(correlation_id, n, remaining)
                sent += 1
            else:
                self.connection.process_data_events(remaining)  # calls on_answer, if one comes
            if self.channel.is_closed:
                raise AMQPConnectionError("RabbitMQ refused a request, and closed the channel")
        return [self.result(n, *self.answers[correlation_id]) for correlation_id, n in requests]

    def send(self, correlation_id, n, seconds):
        self.waiting.add(correlation_id)
        self.channel.basic_publish(
            exchange="",
            routing_key="rpc_queue",
            body=str(n).encode(),
            properties=pika.BasicProperties(
                reply_to=self.callback_queue,
                correlation_id=correlation_id,
                expiration=str(int(seconds * 1000)),  # after this time, RabbitMQ drops it
                content_type="text/plain",
            ),
            mandatory=True,  # if there is no queue, the request comes back to on_return
        )

    def on_answer(self, channel, method, properties, body):
        # Ignore an answer that is late, and a second answer to the same request.
        if properties.correlation_id in self.waiting:
            self.waiting.remove(properties.correlation_id)
            self.answers[properties.correlation_id] = properties.type, body

    def on_return(self, channel, method, properties, body):
        properties.type = "error"  # treat the returned request as an answer, with an error
        self.on_answer(
            channel, method, properties, b"there is no queue 'rpc_queue': start a server"
        )

    def on_blocked(self, connection, frame):
        self.blocked = True

    def on_unblocked(self, connection, frame):
        self.blocked = False

    def result(self, n, kind, body):
        """Return the number in an answer. Raises RpcError."""
        if kind == "error" or not re.fullmatch(rb"\d{1,100}", body):
            raise RpcError(f"fib({n}): {body[:100].decode(errors='backslashreplace')}")
        return int(body)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        # close() waits for an answer. If RabbitMQ reads nothing from us, that could take forever.
        closing = threading.Thread(target=self.close, daemon=True)
        closing.start()
        closing.join(timeout=1)

    def close(self):
        with suppress(AMQPError):  # the connection is lost already
            self.connection.close()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--timeout", type=float, default=10, metavar="SECONDS")
parser.add_argument("numbers", type=int, nargs="*", default=[30], metavar="N")


def main():
    options = parser.parse_args()
    with FibonacciRpcClient() as client:
        for n in options.numbers:
            print(f" [x] Requesting fib({n})")
        try:
            for result in client.call_many(options.numbers, options.timeout):
                print(f" [.] Got {result}")
        except ValueError as error:
            parser.error(str(error))


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
