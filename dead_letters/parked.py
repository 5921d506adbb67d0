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
from pika.exceptions import AMQPConnectionError, AMQPError, UnroutableError


def main():
    options = parser.parse_args()
    with connect() as connection:
        channel = connection.channel()
        # passive: do not make the queue, only ask how many tasks are in it.
        count = channel.queue_declare(queue="tasks.parked", passive=True).method.message_count
        sent = 0
        for _ in range(count):
            method, properties, body = channel.basic_get(queue="tasks.parked")  # one task
            if method is None:
                print(" [!] Somebody else has the rest", file=sys.stderr)
                break
            show(properties.headers or {}, body)
            if options.send_back and send_back(channel, method, properties, body):
                channel.basic_ack(delivery_tag=method.delivery_tag)
                sent += 1
    # The connection is closed, so the tasks that we have not acknowledged are in their queue again.
    if options.send_back and sent < count:
        sys.exit(f" [!] {sent} of {count} tasks are sent back")


def show(headers, body):
    print(f" [x] {body.decode(errors='surrogateescape')!r}")
    for failure in as_list(headers.get("failures")):  # the workers have written this
        print(f"     {printable(str(failure))}")
    # RabbitMQ has written this. Its entries for 'tasks.retry' are only the pauses between tries.
    for death in as_list(headers.get("x-death")):
        if isinstance(death, dict) and death.get("queue") == "tasks":
            print(f"     {death.get('time')} RabbitMQ: {death.get('reason')}")


def send_back(channel, method, properties, body):
    """Send a task to 'tasks', as if it were new. Return whether RabbitMQ has stored it there."""
    as_new(properties)
    properties.headers.pop("failures", None)  # the workers count the tries from the beginning
    timer = threading.Timer(10, give_up)  # pika would wait for RabbitMQ without a limit
    timer.start()
    try:
        with channel.connection.channel() as other:  # RabbitMQ closes it if it refuses the task
            other.confirm_delivery()  # now basic_publish waits until the task is stored
            other.basic_publish("", "tasks", body, properties, mandatory=True)
    except Exception as refusal:
        if channel.is_closed or isinstance(refusal, UnroutableError):
            raise  # the connection is lost, or there is no queue 'tasks'
        print(f" [!] It stays parked, because it cannot be sent: {refusal}", file=sys.stderr)
        return False
    finally:
        timer.cancel()
    print("     sent back")
    return True


def give_up():
    try:
        print(
            " [!] No confirm within 10 s: the task is still parked, maybe also sent",
            file=sys.stderr,
        )
    finally:
        os._exit(1)  # to close the connection, we would have to wait for RabbitMQ again


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
