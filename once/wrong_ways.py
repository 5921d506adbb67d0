"""Handle an order in a wrong way, which loses money or books it twice."""

import argparse
import json
import os
import re
import signal
import sqlite3
import sys
import time
import uuid
from contextlib import closing, contextmanager

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends the script at once, as kill does

import pika
from pika.exceptions import AMQPConnectionError, AMQPError


def main():
    options = parser.parse_args()
    with connect() as connection:
        channel = connection.channel()
        channel.queue_declare(queue="orders", durable=True)
        channel.confirm_delivery()
        WAYS[options.way](channel)


# --- Instead of order.py: an order of 10, without an outbox ---


def publish_first(channel):
    with transaction("shop.db") as shop:
        order_id, body = write_order(shop, "carol")
        publish(channel, order_id, body)
        crash("the message is published, and the order is not committed")


def commit_first(channel):
    with transaction("shop.db") as shop:
        order_id, body = write_order(shop, "dave")
    crash("the order is committed, and its message is not published")
    publish(channel, order_id, body)


# --- Instead of relay.py ---


def remove_first(channel):
    with transaction("shop.db") as shop:
        rows = shop.execute("SELECT message_id, body FROM outbox ORDER BY number").fetchall()
        shop.execute("DELETE FROM outbox")
    crash("the messages are removed from the outbox, and not published")
    for message_id, body in rows:
        publish(channel, message_id, body)


# --- Instead of book.py ---


def acknowledge_first(channel):
    _message_id, body, delivery_tag = get(channel)
    channel.basic_ack(delivery_tag=delivery_tag)
    channel.close()  # RabbitMQ has read the acknowledgement
    crash("the message is acknowledged, and the money is not booked")
    with transaction("bank.db") as bank:
        change_balance(bank, body)


def select_first(channel):
    message_id, body, delivery_tag = get(channel)
    with transaction("bank.db") as bank:
        query = "SELECT * FROM booked WHERE order_id = ?"
        row = bank.execute(query, (message_id,)).fetchone()
    if row:
        print(f" [x] Order {message_id} is booked already")
    else:
        print(f" [x] Order {message_id} is not booked yet")
        time.sleep(3)  # some work, in which another worker may look into the table, too
        with transaction("bank.db") as bank:
            change_balance(bank, body)
        with transaction("bank.db") as bank:
            bank.execute("INSERT OR IGNORE INTO booked (order_id) VALUES (?)", (message_id,))
        print(f" [x] Booked order {message_id}")
    channel.basic_ack(delivery_tag=delivery_tag)


# --- What they share ---


def write_order(shop, account):
    order_id = str(uuid.uuid4())
    shop.execute("INSERT INTO orders VALUES (?, ?, 10)", (order_id, account))
    return order_id, json.dumps({"account": account, "amount": 10})


def publish(channel, message_id, body):
    properties = pika.BasicProperties(
        message_id=message_id, delivery_mode=pika.DeliveryMode.Persistent
    )
    channel.basic_publish(
        exchange="", routing_key="orders", body=body, properties=properties, mandatory=True
    )


def get(channel):
    """Return the id, the body and the delivery tag of one message."""
    method, properties, body = channel.basic_get(queue="orders")
    if method is None:
        raise AMQPError("There is no message in the queue 'orders'")
    return properties.message_id, body, method.delivery_tag


def change_balance(bank, body):
    order = json.loads(body)
    bank.execute(
        "INSERT INTO balances VALUES (:account, :amount)"
        " ON CONFLICT (account) DO UPDATE SET amount = amount + excluded.amount",
        order,
    )


def crash(why):
    """End as after kill -9."""
    print(f" [!] Crash: {why}", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def transaction(path):
    """Open the database. At the end, commit; after an error, roll back. Raises OSError."""
    try:
        # timeout: how many seconds to wait while another process writes
        with closing(sqlite3.connect(path, timeout=30)) as database, database:
            yield database
    except sqlite3.Error as error:
        raise OSError(f"{path!r}: {error}") from None


WAYS = {
    "publish-first": publish_first,
    "commit-first": commit_first,
    "remove-first": remove_first,
    "acknowledge-first": acknowledge_first,
    "select-first": select_first,
}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("way", choices=WAYS, metavar="WAY", help=f"one of {', '.join(WAYS)}")


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
