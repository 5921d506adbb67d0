"""Send one log line, with a routing key, to all receivers whose pattern fits this key."""

import argparse
import os
import signal
import sys

import pika
from pika.exceptions import AMQPConnectionError, AMQPError


def main():
    options = parser.parse_args()
    message = " ".join(options.message)
    with connect() as connection:
        channel = connection.channel()

        # A topic exchange compares the words of the routing key, which have dots between them,
        # with the patterns of the bindings.
        channel.exchange_declare(exchange="topic_logs", exchange_type="topic")
        channel.basic_publish(
            exchange="topic_logs", routing_key=options.routing_key, body=os.fsencode(message)
        )

        # Wait until RabbitMQ has read it all. If it refuses something, close() raises an error.
        channel.close()
    print(f" [x] Sent {options.routing_key}:{message}")


def routing_key(text):
    """Return the text, if it can be a routing key."""
    if len(text.encode()) > 255:  # raises ValueError for bytes that are not UTF-8
        raise argparse.ArgumentTypeError("a routing key has at most 255 bytes")
    return text


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "routing_key", type=routing_key, nargs="?", default="anonymous.info", metavar="ROUTING_KEY"
)
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
