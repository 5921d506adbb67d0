"""Do the tasks in the queue 'tasks'. Try a failed one again later. Park it after its last try."""

import argparse
import os
import re
import queue
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl+C and kill end the script at once
        signal.signal(number, lambda *_: os._exit(0))

import pika
from pika.exceptions import AMQPConnectionError, AMQPError


def main(channel, options):
    declare_queues(channel)
    channel.basic_qos(prefetch_count=1)
    channel.basic_consume(queue="tasks", on_message_callback=on_task)
    channel.confirm_delivery()  # from now on, basic_publish waits until the task is stored
    print(" [*] Waiting for tasks. To exit press CTRL+C")
    if not worker.is_alive():  # start it once: it goes on working while we reconnect
        worker.start()


def declare_queues(channel):
    # Tasks wait here for a worker. If the worker dies, RabbitMQ delivers the task again, at most
    # twice. If the third worker dies, too, the task is a dead letter, and goes to 'tasks.parked'.
    limit = {"x-delivery-limit": 2}
    arguments = dead_letters_to("tasks.parked") | limit
    channel.queue_declare(queue="tasks", durable=True, arguments=arguments)
    # Failed tasks wait here for three seconds. Then they are dead letters, too: RabbitMQ moves them
    # back to 'tasks'.
    delay = {"x-message-ttl": 3000}  # milliseconds
    arguments = dead_letters_to("tasks") | delay
    channel.queue_declare(queue="tasks.retry", durable=True, arguments=arguments)
    # Here, tasks wait for a human. When parked.py shows them, they come back, and RabbitMQ counts
    # this. So the limit is so high that no task reaches it.
    no_limit = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000_000}
    channel.queue_declare(queue="tasks.parked", durable=True, arguments=no_limit)


def dead_letters_to(other_queue):
    """Return the settings of a queue that hands dead letters over to another queue."""
    return {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": "",  # the default exchange
        "x-dead-letter-routing-key": other_queue,
        # RabbitMQ keeps a dead letter until the other queue has stored it.
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",  # at-least-once needs this
    }


def on_task(channel, method, properties, body):
    tasks.put((channel, method, properties, body))


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
    if channel.is_closed:
        return  # RabbitMQ has put this task back into its queue, for another worker or for us
    text = body.decode(errors="backslashreplace")
    print(f" [x] Received '{text}'" + (" (redelivered)" if method.redelivered else ""))
    try:
        work(os.fsdecode(body))  # new_task.py has used os.fsencode
    except BaseException as error:  # also SystemExit, which would end this thread
        reason = f"{error!r:.200}"
        answer = partial(put_aside, channel, method, properties, body, reason)
    else:
        print(" [x] Done")
        answer = partial(channel.basic_ack, delivery_tag=method.delivery_tag)
    with suppress(AMQPError):  # if the connection is lost, the task is in its queue again
        # Only pika's thread may use the channel. This asks it to make the call.
        channel.connection.add_callback_threadsafe(answer)


def work(text):
    """Put your own work here. It may take a long time, and it may raise an exception."""
    with open(text) as file:
        print(f" [.] {len(file.read().split())} words")


def put_aside(channel, method, properties, body, reason):
    """Send a failed task to 'tasks.retry', or after its last try to 'tasks.parked'."""
    headers = properties.headers or {}
    now = time.strftime("%Y-%m-%d %H:%M:%S+00:00", time.gmtime())
    failures = [*as_list(headers.get("failures")), f"{now} {reason}"]  # one for each failed try
    properties.headers = headers | {"failures": failures}
    properties.expiration = None  # otherwise it could expire in tasks.parked, and be lost
    properties.user_id = None  # RabbitMQ accepts no other user's name from us
    where = "tasks.retry" if len(failures) < options.tries else "tasks.parked"
    channel.basic_publish(
        exchange="", routing_key=where, body=body, properties=properties, mandatory=True
    )
    # Acknowledge last: if we crash before this, the task is in both queues, but not lost.
    channel.basic_ack(delivery_tag=method.delivery_tag)
    text = body.decode(errors="backslashreplace")
    count = f"{len(failures)} of {options.tries}"
    print(f" [!] '{text}' failed ({count}) and is in {where} now: {reason}", file=sys.stderr)


def as_list(header):
    """Return the header if it is a list, or else an empty list. Any sender can set any header."""
    return header if isinstance(header, list) else []


tasks = queue.SimpleQueue()  # from pika's thread to the thread that does the work
worker = threading.Thread(target=do_tasks, daemon=True)


def number_of_tries(text):
    """Return the number, if it makes sense."""
    if not 1 <= int(text) <= 100:
        raise ValueError
    return int(text)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--tries",
    type=number_of_tries,
    default=3,
    metavar="N",
    help="park a task when it has failed this many times, from 1 to 100",
)


# --- From here on, all consumers have the same code: see the end of lesson 1 (hello_world). ---


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


def run(options):
    """Consume until the script is stopped. Raises AMQPError for what stays wrong when it starts."""
    worked = False
    reported = ""
    while True:
        try:
            with connect() as connection:
                channel = connection.channel()
                main(channel, options)
                worked = True  # from now on, errors of RabbitMQ may be temporary
                channel.start_consuming()
                # It returns when it has no consumer any more: the queue was deleted, for example.
                raise AMQPError("RabbitMQ cancelled the consumer")
        except AMQPError as error:
            if not worked and re.search(HOPELESS, str(error)):
                raise
            if str(error) != reported:
                print(f" [!] {error}; trying again every second", file=sys.stderr)
            reported = str(error)
        time.sleep(1)


# A wrong address, password, permission or virtual host; a queue that has other settings
HOPELESS = "AMQP_URL|ACCESS_REFUSED|NOT_ALLOWED(?!.*limit)|PRECONDITION_FAILED"

if __name__ == "__main__":
    try:
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)
        sys.stderr = sys.stderr or open(os.devnull, "w")  # if standard error is closed
        run(parser.parse_args())
    except (AMQPError, OSError) as error:  # OSError if the output is closed or full, for example
        try:
            print(f" [!] {error}", file=sys.stderr)
        finally:
            os._exit(1)  # sys.exit would try to write the rest of the output, and may fail again
