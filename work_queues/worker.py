"""Do the tasks in the queue 'task_queue', one at a time. Each dot is a second of work."""

import argparse
import os
import queue
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial

import pika
from pika.exceptions import (
    AMQPConnectionError,
    AMQPError,
    ChannelClosedByBroker,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)


def main(channel):
    channel.queue_declare(queue="task_queue", durable=True)

    # RabbitMQ sends us this many tasks before it waits for our acknowledgements.
    channel.basic_qos(prefetch_count=options.prefetch)
    channel.basic_consume(
        queue="task_queue", on_message_callback=on_task, auto_ack=options.auto_ack
    )
    channel.confirm_delivery()  # from now on, basic_publish waits until the task is stored
    print(" [*] Waiting for tasks. To exit press CTRL+C")
    if not worker.is_alive():  # start it once: it goes on working while we reconnect
        worker.start()


def on_task(channel, method, properties, body):
    if options.in_callback:
        do_task(channel, method, properties, body)  # pika waits here, and sends no heartbeat
    else:
        tasks.put((channel, method, properties, body))  # pika goes on, and sends heartbeats


def do_tasks():
    """Do one task after the other. This runs in a thread of its own, next to pika's."""
    try:
        while True:
            do_task(*tasks.get())
    except BaseException as error:  # the output is closed or full, for example
        try:
            print(f" [!] {error}", file=sys.stderr)
        finally:  # standard error may be closed, too
            os._exit(1)


def do_task(channel, method, properties, body):
    if channel.is_closed and not options.auto_ack:
        return  # RabbitMQ has put this task back into its queue, for another worker or for us
    text = body.decode(errors="backslashreplace")
    print(f" [x] Received '{text}'" + (" (redelivered)" if method.redelivered else ""))
    try:
        work(text)
    except BaseException as error:  # also SystemExit, which would end this thread
        print(f" [!] '{text}' failed: {error!r}", file=sys.stderr)
        time.sleep(1)  # otherwise a task that always fails would be tried without a pause
        answer = partial(put_back, channel, method, properties, body)
    else:
        print(" [x] Done")
        answer = partial(channel.basic_ack, delivery_tag=method.delivery_tag)
    if options.auto_ack or options.forget_ack:
        return
    with suppress(AMQPError):  # if the connection is lost, the task is in its queue again
        # Only pika's thread may use the channel. This asks it to make the call.
        channel.connection.add_callback_threadsafe(answer)


def work(text):
    """Put your own work here. It may take a long time, and it may raise an exception."""
    time.sleep(text.count("."))


def put_back(channel, method, properties, body):
    """Send a failed task to the end of the queue, behind the tasks that wait there."""
    properties.user_id = None  # RabbitMQ accepts no other user's name from us
    channel.basic_publish(
        exchange="", routing_key="task_queue", body=body, properties=properties, mandatory=True
    )
    # Acknowledge last: if we crash before this, the task is in the queue twice, but not lost.
    channel.basic_ack(delivery_tag=method.delivery_tag)


tasks = queue.SimpleQueue()  # from pika's thread to the thread that does the work
worker = threading.Thread(target=do_tasks, daemon=True)


def prefetch_count(text):
    """Return the number. AMQP has 16 bits for it."""
    if not 0 <= int(text) <= 65535:
        raise ValueError
    return int(text)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--prefetch",
    type=prefetch_count,
    default=1,
    metavar="N",
    help="how many tasks RabbitMQ sends before it waits for acknowledgements; 0: no limit",
)
parser.add_argument("--auto-ack", action="store_true", help="RabbitMQ forgets a task it has sent")
parser.add_argument("--forget-ack", action="store_true", help="never acknowledge a task")
parser.add_argument("--in-callback", action="store_true", help="work in pika's own thread")


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
