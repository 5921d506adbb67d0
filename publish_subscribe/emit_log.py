"""Emit one log to whoever listens, through the fanout exchange 'logs'."""

import argparse
import os
import signal
import sys

import pika
from pika.exceptions import AMQPConnectionError, AMQPError

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("message", nargs="*", default=["info: Hello World!"], metavar="MESSAGE")
    message = " ".join(parser.parse_args().message)

    connection = connect()
    channel = connection.channel()
    channel.exchange_declare("logs", exchange_type="fanout", durable=True)
    channel.basic_publish(exchange="logs", routing_key="", body=os.fsencode(message))
    channel.close()  # the broker agrees once it has the message, or says why it refuses it
    connection.close()
    print(f" [x] Sent '{message}'")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main()
    except (AMQPError, OSError) as error:
        sys.exit(f" [!] {error}")
