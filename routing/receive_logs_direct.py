"""Print each log line that is sent from now on and has one of the given severities."""

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
    channel.exchange_declare(exchange="direct_logs", exchange_type="direct")

    # A queue of our own, as in lesson 3.
    queue = channel.queue_declare(queue="", exclusive=True).method.queue

    # One binding for each severity that we want.
    for severity in options.severities:
        channel.queue_bind(queue=queue, exchange="direct_logs", routing_key=severity)
    channel.basic_consume(queue=queue, on_message_callback=on_log, auto_ack=True)
    print(" [*] Waiting for logs. To exit press CTRL+C", file=sys.stderr)


def on_log(channel, method, properties, body):
    text = body.decode(errors="backslashreplace")
    print(f" [x] {method.routing_key}:{text}")


def routing_key(text):
    """Return the text, if it can be a routing key."""
    if len(text.encode()) > 255:  # raises ValueError for bytes that are not UTF-8
        raise argparse.ArgumentTypeError("a routing key has at most 255 bytes")
    return text


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("severities", type=routing_key, nargs="+", metavar="SEVERITY")


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
