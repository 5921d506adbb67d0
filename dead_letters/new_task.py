"""Send one task to the queue 'tasks'. A task is the name of a file whose words to count."""

import argparse
import os
import signal
import sys
import threading

import pika
from pika.exceptions import AMQPConnectionError, AMQPError, UnroutableError


def main():
    options = parser.parse_args()
    with connect() as connection:
        channel = connection.channel()
        channel.confirm_delivery()  # basic_publish waits until RabbitMQ has stored the task
        timer = threading.Timer(10, give_up)  # pika would wait for RabbitMQ without a limit
        timer.start()
        try:
            channel.basic_publish(
                exchange="",
                routing_key="tasks",
                body=os.fsencode(options.task),
                properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent),
                mandatory=True,
            )
        except UnroutableError:  # the worker declares the queue, with all of its settings
            sys.exit(" [!] There is no queue 'tasks': start a worker")
        finally:
            timer.cancel()
    print(f" [x] Sent '{options.task}'")


def give_up():
    print(" [!] No confirm within 10 s: nobody knows if the task is stored", file=sys.stderr)
    os._exit(1)  # to close the connection, we would have to wait for RabbitMQ again


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("task", metavar="FILE")


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
