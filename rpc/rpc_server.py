"""Answer the requests in the queue 'rpc_queue' with Fibonacci numbers."""

import argparse
import os
import signal
import sys
import time

import pika
from pika.exceptions import (
    AMQPConnectionError,
    AMQPError,
    ChannelClosedByBroker,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)


def main(channel):
    channel.queue_declare(queue="rpc_queue", durable=True)
    channel.basic_qos(prefetch_count=1)  # the next request goes to a server that is free
    channel.basic_consume(queue="rpc_queue", on_message_callback=on_request)
    print(" [x] Awaiting RPC requests")


def on_request(channel, method, properties, body):
    if properties.reply_to:  # without it, nobody waits for an answer
        kind, text = answer(body)
        channel.basic_publish(
            exchange="",
            routing_key=properties.reply_to,
            body=text.encode(),
            properties=pika.BasicProperties(
                correlation_id=properties.correlation_id, type=kind, content_type="text/plain"
            ),
        )
    # Acknowledge last: if this server crashes before this, another one gets the request.
    channel.basic_ack(delivery_tag=method.delivery_tag)


def answer(body):
    """Return the type of the answer, "result" or "error", and its text."""
    try:
        n = int(body)
    except ValueError:  # words, nothing at all, or bytes that are not text
        n = -1
    if not 0 <= n <= 40:
        return "error", "not a whole number from 0 to 40"
    print(f" [.] fib({n})")
    return "result", str(fib(n))


def fib(n):
    """Return the n-th Fibonacci number, slowly on purpose: it stands for expensive work.

    fib(40) takes ten seconds or more. Work that takes minutes needs a second thread, as in
    worker.py of lesson 2.
    """
    return n if n < 2 else fib(n - 1) + fib(n - 2)


parser = argparse.ArgumentParser(description=__doc__)


# --- From here on, all consumers have the same code: see the end of lesson 1 (hello_world). ---

AMQP_URL = os.getenv("AMQP_URL") or "amqp://guest:guest@localhost:5672/%2F"


def connect():
    """Connect to RabbitMQ. AMQP_URL may list several, with commas: take the first that answers."""
    try:
        brokers = [pika.URLParameters(url.strip()) for url in AMQP_URL.split(",")]
    except Exception:  # do not print this exception: it may contain the password
        sys.exit(" [!] AMQP_URL must look like amqp://user:password@host:5672/virtual_host")
    for broker in brokers:  # pika accepts a list, too, but gives up at a name it cannot resolve
        try:
            return pika.BlockingConnection(broker)
        except Exception as error:  # an error of pika, of the socket or of TLS
            reason = repr(error)
            if "ACCESS_REFUSED" in reason or "NOT_ALLOWED" in reason:
                raise  # wrong password, wrong virtual host
    raise AMQPConnectionError(f"No RabbitMQ answers (docker compose up -d starts one): {reason}")


if __name__ == "__main__":
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl+C and kill end the script at once
        signal.signal(number, lambda signum, frame: os._exit(0))
    # Until RabbitMQ has accepted us for the first time, these errors end the script.
    fatal = (OSError, ChannelClosedByBroker, ProbableAuthenticationError, ProbableAccessDeniedError)
    reported = ""
    while True:
        try:
            sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)
            with connect() as connection:
                channel = connection.channel()
                main(channel)
                fatal = OSError  # It works. From now on, errors of RabbitMQ may be temporary.
                channel.start_consuming()
                # It returns when it has no consumer any more: the queue was deleted, for example.
                raise AMQPError("RabbitMQ cancelled the consumer")
        except fatal as error:  # OSError if the output is closed or full, for example
            print(f" [!] {error}", file=sys.stderr)
            os._exit(1)  # sys.exit would try to write the rest of the output, and may fail again
        except AMQPError as error:
            if str(error) != reported:
                print(f" [!] {error}; trying again every second", file=sys.stderr)
            reported = str(error)
        time.sleep(1)
