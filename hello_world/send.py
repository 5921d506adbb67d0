"""Send one message to the queue 'hello'."""

import argparse
import os
import re
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends the script at once, as kill does

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
    print(f" [x] Sent {message!r}")


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("message", nargs="*", default=["Hello World!"], metavar="MESSAGE")


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
