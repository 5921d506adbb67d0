"""Do the tasks in the queue 'tasks'. Try a failed one again later. Park it after its last try."""

import argparse
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl+C and kill end the script at once
        signal.signal(number, lambda *_: os._exit(0))

import pika
from pika.exceptions import AMQPConnectionError, AMQPError, UnroutableError


def main(channel, options):
    declare_queues(channel)
    channel.basic_qos(prefetch_count=1)
    channel.basic_consume(queue="tasks", on_message_callback=partial(on_task, options))
    print(" [*] Waiting for tasks. To exit press CTRL+C")


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
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000_000} | NO_LOSS
    channel.queue_declare(queue="tasks.parked", durable=True, arguments=arguments)


def dead_letters_to(other_queue):
    """Return the settings of a queue that hands dead letters over to another queue."""
    return NO_LOSS | {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": "",  # the default exchange
        "x-dead-letter-routing-key": other_queue,
        # With NO_LOSS, RabbitMQ keeps a dead letter until the other queue has stored it.
        "x-dead-letter-strategy": "at-least-once",
    }


NO_LOSS = {"x-overflow": "reject-publish"}  # a full queue takes no more, instead of dropping tasks


def on_task(options, channel, method, properties, body):
    text = body.decode(errors="surrogateescape")
    print(f" [x] Received {text!r}" + (" (redelivered)" if method.redelivered else ""))
    job = executor.submit(work, os.fsdecode(body))  # a file name needs its bytes unchanged
    try:
        while wait([job], timeout=0.2).not_done:  # the work is done in another thread
            channel.connection.process_data_events()  # and this one, pika's, sends heartbeats
    except AMQPError:
        job.cancel()  # if it has not begun, leave it: the task is in its queue again
        raise
    if channel.is_closed:
        return  # the task is in its queue again, and start_consuming raises the reason
    if job.exception():
        put_aside(options, channel, method, properties, body, job.exception())
    else:
        print(" [x] Done")
        channel.basic_ack(delivery_tag=method.delivery_tag)


executor = ThreadPoolExecutor(max_workers=1)


def work(text):
    """Put your own work here. It may take a long time, and it may raise an exception."""
    with open(text) as file:
        print(f" [.] {len(file.read().split())} words")


def put_aside(options, channel, method, properties, body, error):
    """Send a failed task to 'tasks.retry', or after its last try to 'tasks.parked'."""
    text = body.decode(errors="surrogateescape")
    reason = printable(f"{type(error).__name__}: {error}"[:200])
    failures = as_list((properties.headers or {}).get("failures"))
    count = f"{len(failures) + 1} of {options.tries}"
    now = time.strftime("%Y-%m-%d %H:%M:%S+00:00", time.gmtime())
    as_new(properties)
    properties.headers["failures"] = [*failures, f"{now} {reason}"]  # one for each failed try
    queues = ["tasks.retry", "tasks.parked"]
    if len(failures) + 1 >= options.tries:
        queues = ["tasks.parked"]
    for queue in queues:
        try:
            with channel.connection.channel() as other:  # RabbitMQ closes it if it refuses the task
                other.confirm_delivery()  # now basic_publish waits until the task is stored
                other.basic_publish("", queue, body, properties, mandatory=True)
        except Exception as refusal:
            if channel.is_closed or isinstance(refusal, UnroutableError):
                raise  # the connection is lost, or the queue is gone: begin again, and declare it
            print(f" [!] {queue} does not take {text!r}: {refusal}", file=sys.stderr)
        else:
            # Acknowledge last: if we crash before this, the task is in both queues, but not lost.
            channel.basic_ack(delivery_tag=method.delivery_tag)
            print(
                f" [!] {text!r} failed ({count}) and is in {queue} now: {reason}", file=sys.stderr
            )
            return
    print(f" [!] {text!r} failed ({count}), and RabbitMQ parks it: {reason}", file=sys.stderr)
    channel.basic_reject(delivery_tag=method.delivery_tag, requeue=False)  # to tasks.parked


def as_new(properties):
    """Remove what RabbitMQ would refuse, or do a second time, and what it has written."""
    properties.user_id = None  # RabbitMQ accepts no other user's name from us
    properties.expiration = None  # otherwise the task could expire in tasks.parked, and be lost
    headers = (properties.headers or {}).items()
    properties.headers = {k: v for k, v in headers if k not in NOT_SENT_ON}


# CC and BCC name more queues to send the task to. RabbitMQ 3.10 takes a task with an x-death header
# for one that goes round in circles, and drops it.
NOT_SENT_ON = {"CC", "BCC", "x-death", "x-delivery-count", "x-acquired-count"}
for what in ("queue", "reason", "exchange"):
    NOT_SENT_ON |= {f"x-first-death-{what}", f"x-last-death-{what}"}


def as_list(header):
    """Return the header as a list. Any sender can set any header."""
    return header if isinstance(header, list) else [] if header is None else [header]


def printable(text):
    """Return the text in one line, with escapes for line ends and other control characters."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def number_of_tries(text):
    """Return the number, if it makes sense."""
    if not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError("must be from 1 to 100")
    return int(text)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tries", type=number_of_tries, default=3, metavar="N", help="before parking")


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


URL = "amqps?://([^@/?#]*@)?[^@/?#:][^@/?#]*([/?][^@#]*)?"  # pika would take one without a host
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


# A malformed AMQP_URL, a wrong password or virtual host, no permission, other settings of a queue
HOPELESS = "AMQP_URL|(ACCESS_REFUSED|NOT_ALLOWED|PRECONDITION_FAILED)(?!.* (reached|down|replica))"

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
