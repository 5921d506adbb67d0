"""Book each order in the queue 'orders' to its account, and no order twice."""

import argparse
import json
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
    with transaction(options.database) as bank:
        bank.executescript(TABLES)
    channel.queue_declare(queue="orders", durable=True)
    channel.basic_qos(prefetch_count=options.together)
    messages = []  # those that have come since the last acknowledgement on this channel

    def on_message(channel, method, properties, body):
        messages.append((method, properties, body))
        if len(messages) == options.together:
            book_all(channel, messages, options)
        elif len(messages) == 1:  # wait 10 milliseconds for more of them
            channel.connection.call_later(0.01, lambda: book_all(channel, messages, options))

    channel.basic_consume(queue="orders", on_message_callback=on_message)
    print(" [*] Waiting for orders. To exit press CTRL+C")


def book_all(channel, messages, options):
    """Book these messages in one transaction, and then acknowledge them."""
    if not messages:
        return
    with transaction(options.database) as bank:
        lines = [book(bank, properties, body) for _method, properties, body in messages]
        crash_if(options, "before-commit")
    for line in lines:
        print(line, file=sys.stderr if line.startswith(" [!]") else sys.stdout)
    crash_if(options, "after-commit")

    # Acknowledge last: if we crash before this, they come again, and book() knows their ids.
    last, _properties, _body = messages[-1]
    channel.basic_ack(delivery_tag=last.delivery_tag, multiple=True)
    messages.clear()


def book(bank, properties, body):
    """Book the order in this message, if it is not booked yet. Return the line to print."""
    try:
        order_id, account, amount = read(properties, body)
    except Exception as error:  # it would be the same each time: keep the message for a human
        bank.execute("INSERT INTO not_booked VALUES (?, ?)", (ascii(properties), body))
        return f" [!] Not an order, so it is in the table 'not_booked': {error!r:.200}"

    # The primary key keeps an id from coming in twice. Then nothing is inserted: rowcount is 0.
    row = bank.execute("INSERT OR IGNORE INTO booked (order_id) VALUES (?)", (order_id,))
    if row.rowcount == 0:
        return f" [x] Order {order_id} is booked already"
    bank.execute(
        "INSERT INTO balances (account, amount) VALUES (?, ?)"
        " ON CONFLICT (account) DO UPDATE SET amount = amount + excluded.amount",
        (account, amount),
    )
    return f" [x] Booked order {order_id}: {amount} for {account}"


def read(properties, body):
    """Return the order's id, account and amount. Raises an exception if this is not an order."""
    order = json.loads(body)
    order_id, account, amount = properties.message_id, order["account"], order["amount"]
    for text in (order_id, account):
        if type(text) is not str or not re.fullmatch(r"[\w.-]{1,100}", text):
            raise ValueError(f"{text!r} is not an id or an account")
    if type(amount) is not int or not 1 <= amount <= 1_000_000_000:
        raise ValueError(f"{amount!r} is not an amount")
    return order_id, account, amount


TABLES = """
    CREATE TABLE IF NOT EXISTS balances (account TEXT PRIMARY KEY, amount INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS booked (
        order_id TEXT PRIMARY KEY, at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
    );
    CREATE TABLE IF NOT EXISTS not_booked (properties TEXT NOT NULL, body BLOB NOT NULL);
"""


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
parser.add_argument("--database", default="bank.db", metavar="FILE", help="default: %(default)s")
parser.add_argument(
    "--together",
    type=number_of_messages,
    default=50,
    metavar="N",
    help="book up to so many messages in one transaction; default: %(default)s",
)
parser.add_argument("--crash", choices=["before-commit", "after-commit"], help="crash then")


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
