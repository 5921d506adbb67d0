"""Print what arrives in the queue 'hello'."""

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


def on_message(_c: BlockingChannel, _m: Basic.Deliver, _p: BasicProperties, body: bytes) -> None:
    print(f" [x] Received '{body.decode(errors='backslashreplace')}'")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()

    connection = connect()
    channel = connection.channel()
    channel.queue_declare("hello", durable=True)
    channel.basic_consume("hello", on_message, auto_ack=True)
    print(" [*] Waiting for messages. To exit press CTRL+C")
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
