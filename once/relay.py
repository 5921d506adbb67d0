"""Publish the messages that wait in the shop's outbox, in their order, and remove them."""

import argparse
import os
import re
import signal
import sqlite3
import sys
import time
from contextlib import closing, contextmanager

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl+C and kill end the script at once
        signal.signal(number, lambda *_: os._exit(0))

import pika
from pika.exceptions import AMQPConnectionError, AMQPError


def main(channel, options):
    with transaction(options.database) as shop:
        shop.execute(OUTBOX)
    channel.queue_declare(queue="orders", durable=True)
    channel.confirm_delivery()  # from now on, basic_publish waits until the message is stored
    print(" [*] Waiting for orders. To exit press CTRL+C")


def relay(channel, options):
    """Publish what is in the outbox. The code below calls this again and again."""
    with transaction(options.database) as shop:
        query = "SELECT number, message_id, body FROM outbox ORDER BY number LIMIT ?"
        rows = shop.execute(query, (options.together,)).fetchall()
    if not rows:
        channel.connection.sleep(0.1)  # seconds; pika sends heartbeats meanwhile
        return

    crash_if(options, "before-publish")
    for _number, message_id, body in rows:
        channel.basic_publish(
            exchange="",
            routing_key="orders",
            body=body,
            properties=pika.BasicProperties(
                message_id=message_id,  # by this, the consumer knows a message that comes twice
                content_type="application/json",
                delivery_mode=pika.DeliveryMode.Persistent,
            ),
            mandatory=True,  # it is an error if there is no queue any more
        )
        print(f" [x] Published order {message_id}")
    crash_if(options, "after-confirm")

    # Remove them last: if we crash before this, they are published again, but not lost.
    with transaction(options.database) as shop:
        numbers = [(number,) for number, _message_id, _body in rows]
        shop.executemany("DELETE FROM outbox WHERE number = ?", numbers)


# The same table as in order.py: either of the two scripts may run first.
OUTBOX = """CREATE TABLE IF NOT EXISTS outbox (
    number INTEGER PRIMARY KEY AUTOINCREMENT, message_id TEXT NOT NULL, body TEXT NOT NULL
)"""


@contextmanager
def transaction(path):
    """Open the database. At the end, commit; after an error, roll back. Raises OSError."""
    try:
        # timeout: how many seconds to wait while another process writes
        with closing(sqlite3.connect(path, timeout=30)) as database, database:
            yield database
    except sqlite3.Error as error:
        raise OSError(f"{path!r}: {error}") from None


def crash_if(options, moment):
    """End as after kill -9, if the option --crash says so."""
    if options.crash == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def number_of_messages(text):
    """Return the number. AMQP has 16 bits for it."""
    if not 1 <= int(text) <= 65535:
        raise ValueError
    return int(text)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--database", default="shop.db", metavar="FILE", help="default: %(default)s")
parser.add_argument(
    "--together",
    type=number_of_messages,
    default=50,
    metavar="N",
    help="remove up to so many messages in one transaction; default: %(default)s",
)
parser.add_argument("--crash", choices=["before-publish", "after-confirm"], help="crash then")


# --- From here on, this is nearly the code of all consumers: see the end of lesson 1. ---


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
    """Relay until the script is stopped. Raises AMQPError for what stays wrong when it starts."""
    worked = False
    reported = ""
    while True:
        try:
            with connect() as connection:
                channel = connection.channel()
                main(channel, options)
                worked = True  # from now on, errors of RabbitMQ may be temporary
                while True:
                    relay(channel, options)
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
