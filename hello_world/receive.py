"""Print each message that arrives in the queue 'hello'."""

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
    # The same declaration as in send.py: either of the two scripts may run first.
    channel.queue_declare(queue="hello", durable=True)

    # Subscribe to this queue. As soon as pika waits for messages, at the end of this file,
    # it calls on_message for each of them.
    # With auto_ack, RabbitMQ forgets a message as soon as it has sent it.
    channel.basic_consume(queue="hello", on_message_callback=on_message, auto_ack=True)
    print(" [*] Waiting for messages. To exit press CTRL+C")


def on_message(channel, method, properties, body):
    # The body is bytes. Those that are not UTF-8 text are shown as \xe9 and the like.
    text = body.decode(errors="backslashreplace")
    print(f" [x] Received '{text}'")


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
