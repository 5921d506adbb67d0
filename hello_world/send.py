"""Send one message to the queue 'hello'."""

import argparse
import os
import signal
import sys

import pika
from pika.exceptions import AMQPConnectionError, AMQPError


def main():
    message = " ".join(parser.parse_args().message)
    with connect() as connection:
        channel = connection.channel()

        # Make sure that the queue is there. If it exists already, this changes nothing.
        # A durable queue is still there after RabbitMQ has been restarted.
        channel.queue_declare(queue="hello", durable=True)

        # A message is bytes. The exchange with the empty name puts it into the queue whose
        # name is the routing key.
        channel.basic_publish(exchange="", routing_key="hello", body=os.fsencode(message))

        # Wait until RabbitMQ has read it all. If it refuses something, close() raises an error.
        channel.close()
    print(f" [x] Sent '{message}'")


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("message", nargs="*", default=["Hello World!"], metavar="MESSAGE")


# --- From here on, all producers have the same code: see the end of lesson 1 (hello_world). ---

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
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl+C and kill end the script at once
        signal.signal(number, lambda signum, frame: os._exit(128 + signum))
    try:
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)
        main()
    except (AMQPError, OSError) as error:  # OSError if the output is closed or full, for example
        print(f" [!] {error}", file=sys.stderr)
        os._exit(1)  # sys.exit would try to write the rest of the output, and may fail again
