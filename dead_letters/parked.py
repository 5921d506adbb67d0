"""List the tasks in the queue 'tasks.parked': what failed, when and why. Or send them back."""

import argparse
import os
import re
import signal
import sys
import threading

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends the script at once, as kill does

import pika
from pika.exceptions import AMQPConnectionError, AMQPError


def main():
    options = parser.parse_args()
    with connect() as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        # passive: do not make the queue, only ask how many tasks are in it.
        parked = channel.queue_declare(queue="tasks.parked", passive=True)
        for _ in range(parked.method.message_count):
            method, properties, body = channel.basic_get(queue="tasks.parked")  # one task
            if method is None:
                break  # somebody else has the rest
            show(properties.headers or {}, body)
            if options.send_back:
                send_back(channel, method, properties, body)
    # The connection is closed, so the tasks that we have not acknowledged are in their queue again.


def show(headers, body):
    print(f" [x] '{body.decode(errors='backslashreplace')}'")
    for failure in as_list(headers.get("failures")):  # the workers have written this
        print(f"     {failure}")
    # RabbitMQ has written this. Its entries for 'tasks.retry' are only the pauses between tries.
    for death in as_list(headers.get("x-death")):
        if isinstance(death, dict) and death.get("queue") == "tasks":
            print(f"     {death.get('time')} RabbitMQ: {death.get('reason')}")


def as_list(header):
    """Return the header if it is a list, or else an empty list. Any sender can set any header."""
    return header if isinstance(header, list) else []


def send_back(channel, method, properties, body):
    headers = (properties.headers or {}).items()
    properties.headers = {name: value for name, value in headers if name not in NOTES}
    properties.user_id = None  # RabbitMQ accepts no other user's name from us
    timer = threading.Timer(10, give_up)  # pika would wait for RabbitMQ without a limit
    timer.start()
    channel.basic_publish(
        exchange="", routing_key="tasks", body=body, properties=properties, mandatory=True
    )
    timer.cancel()
    # Acknowledge last: if we crash before this, the task is in both queues, but not lost.
    channel.basic_ack(delivery_tag=method.delivery_tag)
    print("     sent back")


def give_up():
    print(" [!] No confirm within 10 s: the task is still parked, maybe also sent", file=sys.stderr)
    os._exit(1)  # to close the connection, we would have to wait for RabbitMQ again


# send_back removes these headers, which worker.py and RabbitMQ have added. So the worker counts the
# tries from the beginning, and RabbitMQ 3.10 does not think that the task is in an endless loop.
NOTES = {"failures", "x-death", "x-delivery-count", "x-acquired-count"}
NOTES |= {"x-first-death-queue", "x-first-death-reason", "x-first-death-exchange"}
NOTES |= {"x-last-death-queue", "x-last-death-reason", "x-last-death-exchange"}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--send-back", action="store_true", help="try them again, as if they were new")


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
