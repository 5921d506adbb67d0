"""Take an order: write it into the shop's database, together with the message about it."""

import argparse
import json
import os
import re
import signal
import sqlite3
import sys
import uuid
from contextlib import closing, contextmanager

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends the script at once, as kill does


def main():
    options = parser.parse_args()
    order_id = str(uuid.uuid4())  # no other order has it, on no other computer
    message = json.dumps({"account": options.account, "amount": options.amount})

    # One transaction: the database keeps both rows, or none of them. RabbitMQ is not needed here.
    with transaction(options.database) as shop:
        shop.execute(ORDERS)
        shop.execute(OUTBOX)
        shop.execute(
            "INSERT INTO orders (order_id, account, amount) VALUES (?, ?, ?)",
            (order_id, options.account, options.amount),
        )
        shop.execute("INSERT INTO outbox (message_id, body) VALUES (?, ?)", (order_id, message))
        crash_if(options, "before-commit")
    crash_if(options, "after-commit")
    print(f" [x] Order {order_id}: {options.amount} for {options.account}")


ORDERS = """CREATE TABLE IF NOT EXISTS orders (
    order_id TEXT PRIMARY KEY, account TEXT NOT NULL, amount INTEGER NOT NULL
)"""
# AUTOINCREMENT: a number is never used again, even if its row has been deleted.
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


def account(text):
    """Return the name, if it can be one: letters, digits and _ . -"""
    if not re.fullmatch(r"[\w.-]{1,100}", text):
        raise argparse.ArgumentTypeError("must be 1 to 100 letters, digits, or any of _ . -")
    return text


def amount(text):
    """Return the number, if it can be one: whole cents, for example, so that no sum is rounded."""
    if not re.fullmatch("[0-9]{1,10}", text) or not 1 <= int(text) <= 1_000_000_000:
        raise argparse.ArgumentTypeError("must be a whole number from 1 to 1000000000")
    return int(text)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("account", type=account, metavar="ACCOUNT", help="whose money it is")
parser.add_argument("amount", type=amount, metavar="AMOUNT", help="how much, in whole cents")
parser.add_argument("--database", default="shop.db", metavar="FILE", help="default: %(default)s")
parser.add_argument("--crash", choices=["before-commit", "after-commit"], help="crash then")


if __name__ == "__main__":
    try:
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)
        main()
    except OSError as error:  # of the database, or if the output is closed or full
        try:
            print(f" [!] {error}", file=sys.stderr)
        finally:
            os._exit(1)  # sys.exit would try to write the rest of the output, and may fail again
