"""Print how much money is booked to each account."""

import argparse
import os
import signal
import sqlite3
import sys
from contextlib import closing

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends the script at once, as kill does


def main():
    options = parser.parse_args()
    path = options.database or ("shop.db" if options.ordered else "bank.db")
    try:
        with closing(sqlite3.connect(path, timeout=30)) as database:
            rows = database.execute(ORDERED if options.ordered else BOOKED).fetchall()
    except sqlite3.Error as error:
        raise OSError(f"{path!r}: {error}") from None
    for account, amount in rows:
        print(account, amount)


BOOKED = "SELECT account, amount FROM balances ORDER BY account"
ORDERED = "SELECT account, sum(amount) FROM orders GROUP BY account ORDER BY account"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--database", metavar="FILE", help="default: bank.db, or shop.db if --ordered")
parser.add_argument("--ordered", action="store_true", help="the sums of the shop's orders, instead")


if __name__ == "__main__":
    try:
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)
        main()
    except OSError as error:  # of the database, or if the output is closed or full
        try:
            print(f" [!] {error}", file=sys.stderr)
        finally:
            os._exit(1)  # sys.exit would try to write the rest of the output, and may fail again
