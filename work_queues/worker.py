"""Do the tasks in the queue 'task_queue', one at a time. Each dot is a second of work."""

import argparse
import os
import re
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl+C and kill end the script at once
        signal.signal(number, lambda *_: os._exit(0))

import pika
from pika.exceptions import AMQPConnectionError, AMQPError


def main(channel, options):
    channel.queue_declare(queue="task_queue", durable=True)
    consume(channel, options, options.prefetch)
    print(" [*] Waiting for tasks. To exit press CTRL+C")


def consume(channel, options, prefetch):
    # RabbitMQ sends us this many tasks before it waits for our acknowledgements.
    channel.basic_qos(prefetch_count=prefetch)
    tasks = deque()  # those that have come and are not done yet
    channel.basic_consume(
        queue="task_queue",
        on_message_callback=partial(on_task, options, tasks),
        auto_ack=options.auto_ack,
    )


def on_task(options, tasks, channel, method, properties, body):
    tasks.append((method, properties, body))
    if len(tasks) == 1:  # pika calls hand_over once, after on_task for all that came together
        channel.connection.call_later(0, partial(hand_over, options, tasks, channel))


def hand_over(options, tasks, channel):
    done = deque()
    job = executor.submit(do_tasks, options, tasks, channel, done)  # another thread does the work
    while not options.in_callback and wait([job], timeout=0.01).not_done:
        answer(options, channel, done)  # the tasks that are done by now
        channel.connection.process_data_events()  # sends heartbeats; does not call on_task now
    job.result()  # raises what has ended the other thread: the output is closed, for example
    answer(options, channel, done)


executor = ThreadPoolExecutor(max_workers=1)


def do_tasks(options, tasks, channel, done):
    while tasks:
        if channel.is_closed and not options.auto_ack:
            return  # the tasks are in their queue again
        method, properties, body = tasks.popleft()
        text = body.decode(errors="surrogateescape")
        print(f" [x] Received {text!r}" + (" (redelivered)" if method.redelivered else ""))
        failed = False
        try:
            work(text)
        except BaseException as error:  # sys.exit() raises one, too
            failed = True
            print(f" [!] {text!r} failed: {error!r}", file=sys.stderr)
            time.sleep(1)  # otherwise it would be tried again and again without a pause
        else:
            print(" [x] Done")
        done.append((method.delivery_tag, properties, body, failed))


def work(text):
    """Put your own work here. It may take a long time, and it may raise an exception."""
    for _dot in range(text.count(".")):
        time.sleep(1)


def answer(options, channel, done):
    """Acknowledge what is done, several tasks together if possible. Put back what has failed."""
    if options.auto_ack or options.forget_ack or channel.is_closed:
        return  # if the channel is closed, start_consuming raises the reason
    tags = []
    while done:
        tag, properties, body, failed = done.popleft()
        if not failed or put_back(options, channel, properties, body):
            tags.append(tag)
    if len(channel.consumer_tags) > 1:  # put_back has kept one, and started a second consumer
        for tag in tags:
            channel.basic_ack(delivery_tag=tag)
    elif tags:
        channel.basic_ack(delivery_tag=tags[-1], multiple=True)  # this task and all before it


def put_back(options, channel, properties, body):
    """Send a failed task to the end of the queue. Return whether RabbitMQ has stored it there."""
    properties.user_id = None  # RabbitMQ accepts no other user's name from us
    properties.expiration = None  # otherwise it could expire, and be lost
    headers = (properties.headers or {}).items()  # CC and BCC name more queues to send it to
    properties.headers = {name: value for name, value in headers if name not in ("CC", "BCC")}
    try:
        with channel.connection.channel() as other:  # RabbitMQ closes it if it refuses the task
            other.confirm_delivery()  # now basic_publish waits until the task is stored
            other.basic_publish("", "task_queue", body, properties, mandatory=True)
    except Exception as error:
        if channel.is_closed:
            raise  # RabbitMQ has put the task back into its queue already
        print(f" [!] RabbitMQ does not take it back, so we keep it: {error}", file=sys.stderr)
        consume(channel, options, 1)  # a second consumer, as this task takes up a place of ours
        return False
    return True


def prefetch_count(text):
    """Return the number. AMQP has 16 bits for it."""
    if not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError("must be from 0 to 65535")
    return int(text)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prefetch", type=prefetch_count, default=1, metavar="N", help="0: no limit")
parser.add_argument("--auto-ack", action="store_true", help="RabbitMQ forgets a task it has sent")
parser.add_argument("--forget-ack", action="store_true", help="never acknowledge a task")
parser.add_argument("--in-callback", action="store_true", help="let pika wait, without heartbeats")


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
