"""Send one task to the queue 'tasks': its name, and how many seconds of work it is."""

import argparse
import json
import os
import re
import signal
import sys
import threading
import time
import uuid
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends the script at once, as kill does

import pika
from pika.exceptions import AMQPConnectionError, AMQPError, UnroutableError


def main():
    options = parser.parse_args()
    task = {"name": options.name, "seconds": options.seconds}
    properties = pika.BasicProperties(
        delivery_mode=pika.DeliveryMode.Persistent,
        content_type="application/json",
        type="sleep",  # what kind of task this is, for a worker that knows several
        message_id=str(uuid.uuid4()),  # what the logs call this task
        timestamp=int(time.time()),
    )
    with connect() as connection:
        channel = connection.channel()
        channel.confirm_delivery()  # basic_publish waits until RabbitMQ has stored the task
        timer = threading.Timer(10, give_up)  # pika would wait for RabbitMQ without a limit
        timer.start()
        try:
            channel.basic_publish("", "tasks", json.dumps(task), properties, mandatory=True)
        except UnroutableError:
            sys.exit(" [!] There is no queue 'tasks': load definitions.json into RabbitMQ")
        finally:
            timer.cancel()
        print(f" [x] Sent {options.name!r} with the id {properties.message_id}")


def give_up():
    try:
        print(" [!] No confirm within 10 s: nobody knows if the task is stored", file=sys.stderr)
    finally:
        os._exit(1)  # to close the connection, we would have to wait for RabbitMQ again


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seconds", type=float, default=1, metavar="S", help="1 if you do not say")
parser.add_argument("name", metavar="NAME")


# --- From here on, almost the same code as in all producers: see the end of lesson 1. ---


def connect():
    """Connect to the first RabbitMQ in AMQP_URL that accepts us. Raises AMQPConnectionError."""
    urls = os.getenv("AMQP_URL", "amqp://guest:guest@localhost:5672/%2F")
    try:
        if "AMQP_URL_FILE" in os.environ:  # a file, as nobody can see what is in it from outside
            urls = Path(os.environ["AMQP_URL_FILE"]).read_text()
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


URL = "amqps?://([^@/?#]*@)?[^@/?#:][^@/?#]*([/?][^@#]*)?"  # pika would take one without a host
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
