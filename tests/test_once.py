"""Once: each order is booked, and none is booked twice, whatever crashes when."""

from __future__ import annotations

import ast
import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from tests.proxy import ACK, Proxy
from tests.scripts import LOST, SECRET, Crew, Script, Scripts, one_line, replaced
from tests.test_all_scripts import parts_of
from tools import ROOT, environment
from tools.broker import Broker, eventually, free_port

ORDER, RELAY, BOOK = "once/order.py", "once/relay.py", "once/book.py"
BALANCES, WRONG = "once/balances.py", "once/wrong_ways.py"
WAITING = " [*] Waiting for orders. To exit press CTRL+C"
KILLED = -signal.SIGKILL

Order = tuple[str, str, int]  # its id, the account and the amount


class Business:
    """A shop and a bank, each with a database, and the scripts that work for them."""

    def __init__(self, scripts: Scripts, folder: Path) -> None:
        self.scripts = scripts
        self.shop = str(folder / "shop.db")
        self.bank = str(folder / "bank.db")

    def order(self, account: str, amount: int, *options: str, status: int = 0) -> Script:
        """Take an order with order.py."""
        words = (account, str(amount), "--database", self.shop, *options)
        return self.scripts.run(ORDER, *words, status=status)

    def take_orders(self, number: int, accounts: int = 1) -> None:
        """Write so many orders as order.py does, in less time. It has taken one before."""
        with closing(sqlite3.connect(self.shop)) as shop, shop:
            for i in range(number):
                order_id, account, amount = str(uuid.uuid4()), f"account-{i % accounts}", i + 1
                body = json.dumps({"account": account, "amount": amount})
                shop.execute("INSERT INTO orders VALUES (?, ?, ?)", (order_id, account, amount))
                shop.execute(
                    "INSERT INTO outbox (message_id, body) VALUES (?, ?)", (order_id, body)
                )

    def relay(self, *options: str, amqp_url: str | None = None) -> Script:
        """Start relay.py."""
        return self.scripts.start(RELAY, "--database", self.shop, *options, amqp_url=amqp_url)

    def book(self, *options: str, amqp_url: str | None = None) -> Script:
        """Start book.py."""
        return self.scripts.start(BOOK, "--database", self.bank, *options, amqp_url=amqp_url)

    def rows(self, path: str, query: str) -> list[tuple[object, ...]]:
        """Look into a database."""
        with closing(sqlite3.connect(path, timeout=30)) as database:
            return database.execute(query).fetchall()

    def orders(self) -> list[Order]:
        """Return the orders that the shop has taken, in their order."""
        return self.rows(self.shop, "SELECT * FROM orders ORDER BY rowid")  # type: ignore[return-value]

    def outbox(self) -> list[str]:
        """Return the ids of the messages that are not published yet."""
        return [
            str(row[0])
            for row in self.rows(self.shop, "SELECT message_id FROM outbox ORDER BY number")
        ]

    def balances(self, *options: str) -> dict[str, int]:
        """Return what balances.py prints."""
        database = self.shop if "--ordered" in options else self.bank
        printed = self.scripts.run(BALANCES, "--database", database, *options).out.seen
        return {account: int(amount) for account, amount in map(str.split, printed)}

    def expect_booked(self, timeout: float = 60) -> None:
        """Wait until every order is booked, and see that the balances are those of the orders."""
        every = {order_id for order_id, _account, _amount in self.orders()}
        query = "SELECT order_id FROM booked"
        eventually(
            lambda: every == {row[0] for row in self.rows(self.bank, query)},
            "every order is booked",
            timeout,
        )
        assert self.balances() == self.balances("--ordered")


@pytest.fixture
def business(scripts: Scripts, tmp_path: Path) -> Business:
    """A business that has just opened."""
    return Business(scripts, tmp_path)


def take_all(channel: BlockingChannel, number: int) -> list[str]:
    """Take so many messages out of the queue, and return their ids."""
    ids: list[str] = []

    def enough() -> bool:
        while (got := channel.basic_get("orders", auto_ack=True))[0]:
            assert got[1]
            ids.append(str(got[1].message_id))
        return len(ids) >= number

    eventually(enough, f"{number} messages are in the queue")
    return ids


def send(
    channel: BlockingChannel, body: bytes, message_id: str | None, times: int = 1, **properties: str
) -> None:
    """Put a message into the queue, so many times."""
    channel.queue_declare("orders", durable=True)
    for _ in range(times):
        channel.basic_publish(
            "", "orders", body, pika.BasicProperties(message_id=message_id, **properties)
        )


def imported_by(name: str) -> set[str]:
    """Return the names of the packages that a script imports."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    return imported


# --- An order and its message ---


@pytest.mark.parametrize(("crash", "taken"), [("before-commit", 0), ("after-commit", 1)])
def test_an_order_and_its_message_are_both_there_or_neither(
    business: Business, crash: str, taken: int
) -> None:
    """A crash before the commit leaves nothing; one right after it leaves the order and its
    message, even if nobody was told."""
    business.order("alice", 1)
    killed = business.order("alice", 2, "--crash", crash, status=KILLED)
    assert killed.out.seen == []
    assert len(business.orders()) == 1 + taken
    assert business.outbox() == [order_id for order_id, _, _ in business.orders()]


def test_an_order_taker_killed_at_any_moment_leaves_both_or_neither(business: Business) -> None:
    """Twenty of them are killed at random moments. What one has printed is there, too."""
    rng = random.Random(1)
    business.order("alice", 1)
    begin = time.monotonic()
    business.order("alice", 1)
    duration = time.monotonic() - begin
    told = 0
    for _ in range(20):
        script = business.scripts.start(ORDER, "--database", business.shop, "alice", "1")
        time.sleep(rng.uniform(0.3, 1.1) * duration)
        script.kill()
        told += len(script.out.seen)
    assert business.outbox() == [order_id for order_id, _, _ in business.orders()]
    assert len(business.orders()) >= 2 + told


def test_an_order_is_taken_without_rabbitmq(business: Business) -> None:
    """order.py needs neither RabbitMQ nor pika: it speaks to a database, and to nobody else."""
    assert not imported_by(ORDER) & {"pika", "socket"}
    (line,) = business.order("alice", 10).out.seen
    assert line == f" [x] Order {business.outbox()[0]}: 10 for alice"
    uuid.UUID(business.outbox()[0])


def test_many_order_takers_at_once_do_not_disturb_each_other(business: Business) -> None:
    """Ten at a time, while the database is new."""
    with ThreadPoolExecutor(10) as threads:
        list(threads.map(lambda i: business.order(f"a{i}", 1), range(20)))
    assert len(business.orders()) == len(business.outbox()) == 20


NO_WORDS: list[tuple[str | bytes, ...]] = [
    ("alice",),
    ("alice", "1.5"),
    ("alice", "0"),
    ("alice", "--", "-5"),
    ("alice", "1000000001"),
    ("alice", "9" * 5000),
    ("alice", "\u0661"),  # a digit, but none that everybody can read
    ("two words", "1"),
    ("", "1"),
    (b"\xff", "1"),
    ("alice\n", "1"),
]


def test_what_is_no_order_is_refused(business: Business) -> None:
    """A usage line that says what is wrong, and exit status 2. Nothing is written."""
    start = partial(business.scripts.start, ORDER, "--database", business.shop)
    for refused in [start(*words) for words in NO_WORDS]:
        assert refused.wait() == 2
        assert refused.out.seen == []
        assert refused.err.seen[-1].startswith("order.py: error: ")
    assert not Path(business.shop).exists()


# --- The relay ---


def test_the_relay_publishes_what_waits_in_order(
    business: Business, channel: BlockingChannel
) -> None:
    """Orders that were taken before it started, and those that come while it runs. Each message is
    persistent, has the order's id, and leaves the outbox when it is confirmed."""
    for i in range(3):
        business.order("alice", i + 1)
    relay = business.relay()
    relay.expect(WAITING)
    relay.expect(re.compile(r" \[x\] Published order .*"), count=3)
    eventually(lambda: business.outbox() == [], "the outbox is empty")
    business.order("bob", 4)
    relay.expect(re.compile(r" \[x\] Published order .*"), count=4, timeout=5)
    assert [line.split()[-1] for line in relay.out.seen[1:]] == [o[0] for o in business.orders()]
    for order_id, account, amount in business.orders():
        _method, properties, body = channel.basic_get("orders", auto_ack=True)
        assert properties
        assert (properties.message_id, properties.delivery_mode) == (order_id, 2)
        assert json.loads(body or b"") == {"account": account, "amount": amount}


@pytest.mark.parametrize("crash", ["before-publish", "after-confirm"])
def test_a_relay_that_crashes_loses_no_message(
    business: Business, channel: BlockingChannel, crash: str
) -> None:
    """Before it has published, or after the confirms and before it has removed the messages: the
    next one publishes them, some of them for the second time."""
    for i in range(3):
        business.order("alice", i + 1)
    expected = business.outbox()
    assert business.relay("--crash", crash).wait() == KILLED
    assert business.outbox() == expected
    business.relay()
    eventually(lambda: business.outbox() == [], "the outbox is empty")
    published = 2 if crash == "after-confirm" else 1
    assert take_all(channel, 3 * published) == expected * published


def test_a_message_stays_in_the_outbox_until_it_is_confirmed(
    business: Business, channel: BlockingChannel
) -> None:
    """A relay that is killed while a confirm is on its way, or whose connection is lost then,
    loses nothing."""
    business.order("alice", 1)
    business.take_orders(20)
    expected = business.outbox()
    confirms = 0
    arrived = threading.Event()

    def watch(index: int, _to_broker: bool) -> bool:
        nonlocal confirms
        confirms += index == ACK
        if confirms == 7:
            arrived.set()
        return confirms < 7

    with closing(Proxy(business.scripts.amqp_url, watch)) as proxy:
        killed = business.relay(amqp_url=proxy.url)
        assert arrived.wait(15)
        assert business.outbox() == expected
        killed.kill()
        assert business.outbox() == expected
        confirms = 0
        arrived.clear()
        survivor = business.relay("--together", "5", amqp_url=proxy.url)
        assert arrived.wait(15)
        eventually(lambda: len(business.outbox()) == 16, "the first five are confirmed")
        proxy.cut()
        survivor.expect_error(LOST)
        confirms = -1_000_000
        eventually(lambda: business.outbox() == [], "the outbox is empty")
    assert survivor.process.poll() is None
    ids = take_all(channel, 21)
    assert list(dict.fromkeys(ids)) == expected
    assert max(Counter(ids).values()) > 1  # the seventh was in the queue, and not confirmed


def test_two_relays_do_no_harm(business: Business, channel: BlockingChannel) -> None:
    """Each message is published, and the first copies are in order. Some may come twice."""
    business.order("alice", 1)
    relays = [business.relay("--together", "7") for _ in range(2)]
    for relay in relays:
        relay.expect(WAITING)
    business.take_orders(300)
    expected = [order_id for order_id, _, _ in business.orders()]
    eventually(lambda: business.outbox() == [], "the outbox is empty")
    for relay in relays:
        assert relay.err.seen == []
        relay.stop()
    assert list(dict.fromkeys(take_all(channel, len(expected)))) == expected


def test_a_deleted_queue_is_declared_again(business: Business, channel: BlockingChannel) -> None:
    """A message that no queue takes is not lost: the relay says so, and publishes it again."""
    relay = business.relay()
    relay.expect(WAITING)
    channel.queue_delete("orders")
    business.order("alice", 1)
    relay.expect_error(LOST)
    relay.expect(WAITING, count=2)
    eventually(lambda: business.outbox() == [], "the outbox is empty")
    assert take_all(channel, 1) == [business.orders()[0][0]]


# --- The consumer ---


def test_every_order_is_booked(business: Business) -> None:
    """From the order to the balance, whatever starts first. A single order does not wait."""
    bookkeeper = business.book()
    bookkeeper.expect(WAITING)
    relay = business.relay()
    relay.expect(WAITING)
    for account, amount in (("alice", 10), ("bob", 20), ("alice", 5)):
        business.order(account, amount)
    bookkeeper.expect(re.compile(r" \[x\] Booked order \S+: 5 for alice"), timeout=5)
    assert business.balances() == {"alice": 15, "bob": 20}


def test_a_message_that_comes_twice_is_booked_once(
    business: Business, channel: BlockingChannel
) -> None:
    """Whether its copies come one after the other or together."""
    bookkeeper = business.book()
    bookkeeper.expect(WAITING)
    order = b'{"account": "alice", "amount": 10}'
    send(channel, order, "order-1")
    bookkeeper.expect(" [x] Booked order order-1: 10 for alice")
    send(channel, order, "order-1")
    bookkeeper.expect(" [x] Order order-1 is booked already")
    send(channel, order, "order-2", times=30)
    bookkeeper.expect(" [x] Order order-2 is booked already", count=29)
    assert business.balances() == {"alice": 20}


def test_a_message_that_comes_to_two_consumers_at_once_is_booked_once(
    business: Business, channel: BlockingChannel
) -> None:
    """300 orders, each of them three times. RabbitMQ deals them out in turn to three consumers, so
    each consumer gets a copy of each order at about the same time."""
    bookkeepers = [business.book("--together", "3") for _ in range(3)]
    for bookkeeper in bookkeepers:
        bookkeeper.expect(WAITING)
    for i in range(300):
        send(channel, b'{"account": "alice", "amount": 1}', f"order-{i}", times=3)
    printed = re.compile(r" \[x\] (Booked o|O)rder order-.*")

    def lines() -> list[str]:
        return [line for each in bookkeepers for line in each.out.seen if printed.fullmatch(line)]

    eventually(lambda: len(lines()) == 900, "all are done")
    assert sum("Booked" in line for line in lines()) == 300
    assert all(any(printed.fullmatch(line) for line in b.out.seen) for b in bookkeepers)
    assert [b.err.seen for b in bookkeepers] == [[], [], []]
    assert business.balances() == {"alice": 300}


@pytest.mark.parametrize("together", ["1", "50"])
@pytest.mark.parametrize("crash", ["before-commit", "after-commit"])
def test_a_consumer_that_crashes_books_each_order_once(
    business: Business, channel: BlockingChannel, crash: str, together: str
) -> None:
    """Before its commit, nothing is booked; between the commit and the acknowledgement, the
    messages come again, and are booked already."""
    for i in range(3):
        send(channel, b'{"account": "alice", "amount": 10}', f"order-{i}")
    assert business.book("--crash", crash, "--together", together).wait() == KILLED
    booked = 0 if crash == "before-commit" else 3 if together == "50" else 1
    total = business.rows(business.bank, "SELECT coalesce(sum(amount), 0) FROM balances")
    assert total == [(10 * booked,)]
    bookkeeper = business.book()
    bookkeeper.expect(re.compile(r" \[x\] Order order-\d is booked already"), count=booked)
    bookkeeper.expect(re.compile(r" \[x\] Booked order order-\d: 10 for alice"), count=3 - booked)
    assert business.balances() == {"alice": 30}


def test_an_acknowledgement_comes_after_the_commit(
    business: Business, channel: BlockingChannel
) -> None:
    """When RabbitMQ gets the acknowledgement, the money is booked. If it never gets it, because
    the connection is lost, the message comes again, and is not booked again."""
    acknowledged: list[object] = []

    def watch(index: int, to_broker: bool) -> bool:
        if to_broker and index == ACK and not acknowledged:
            acknowledged.extend(business.rows(business.bank, "SELECT amount FROM balances"))
            return False
        return True

    with closing(Proxy(business.scripts.amqp_url, watch)) as proxy:
        bookkeeper = business.book(amqp_url=proxy.url)
        bookkeeper.expect(WAITING)
        send(channel, b'{"account": "alice", "amount": 10}', "order-1")
        eventually(lambda: acknowledged == [(10,)], "it is acknowledged")
        proxy.cut()
        bookkeeper.expect_error(LOST)
        bookkeeper.expect(" [x] Order order-1 is booked already")
    assert business.balances() == {"alice": 10}


def test_consumers_killed_at_random_book_each_order_once(business: Business) -> None:
    """Relays and consumers are killed eight times while 400 orders pass."""
    rng = random.Random(2)
    business.order("alice", 1)
    business.take_orders(400, accounts=10)
    relays = Crew(business.scripts, 1, RELAY, "--database", business.shop)
    bookkeepers = Crew(business.scripts, 2, BOOK, "--database", business.bank, "--together", "5")
    kill_at = set(rng.sample(range(350), 8))
    for lines, _line in zip(count(), bookkeepers.read(), strict=False):
        if lines in kill_at:
            (relays if lines % 2 else bookkeepers).kill_one(rng)
        if lines > max(kill_at):
            break
    business.expect_booked()
    assert relays.complaints() == bookkeepers.complaints() == []


NO_ORDERS = [
    (b"", "id-1"),
    (b"\xff\xfe", "id-2"),
    (b"[" * 100_000, "id-3"),
    (b'{"account": "mallory"}', "id-4"),
    (b'{"account": "mallory", "amount": "10"}', "id-5"),
    (b'{"account": "mallory", "amount": true}', "id-6"),
    (b'{"account": "mallory", "amount": -10}', "id-7"),
    (b'{"account": "mallory", "amount": 1.0}', "id-8"),
    (b'{"account": "mallory", "amount": ' + b"9" * 5000 + b"}", "id-9"),
    (b'{"account": "mall\\ud800ory", "amount": 10}', "id-10"),
    (b'{"account": ["mallory"], "amount": 10}', "id-11"),
    (b'{"account": "mallory", "amount": 10}', None),
    (b'{"account": "mallory", "amount": 10}', "two\nlines"),
    (b"[1, 2]", "id-12"),
    (b"null", "id-13"),
]


def test_what_is_no_order_is_kept_and_blocks_nothing(
    business: Business, channel: BlockingChannel
) -> None:
    """A line on standard error says why. The message is in a table, whole, and the orders before
    and behind it are booked."""
    bookkeeper = business.book()
    bookkeeper.expect(WAITING)
    send(channel, b'{"account": "alice", "amount": 10}', "order-1")
    for body, message_id in NO_ORDERS:
        send(channel, body, message_id, app_id="mallory")
    send(channel, b'{"account": "alice", "amount": 10}', "order-2")
    bookkeeper.expect(" [x] Booked order order-2: 10 for alice")
    bookkeeper.expect_error(re.compile(r" \[!\] Not an order.*"), count=len(NO_ORDERS))
    assert len(bookkeeper.err.seen) == len(NO_ORDERS)
    assert business.balances() == {"alice": 20}
    rows = business.rows(business.bank, "SELECT properties, body FROM not_booked ORDER BY rowid")
    assert [body for _properties, body in rows] == [body for body, _id in NO_ORDERS]
    for (properties, _body), (_body, message_id) in zip(rows, NO_ORDERS, strict=True):
        assert properties == ascii(pika.BasicProperties(message_id=message_id, app_id="mallory"))
    bookkeeper.stop()
    assert channel.queue_declare("orders", passive=True).method.message_count == 0


# --- The wrong ways ---


def wrong(business: Business, way: str) -> Script:
    """Start the script with the wrong ways in the folder of the databases, as a reader does."""
    script = Script(
        [sys.executable, ROOT / WRONG, way],
        environment(business.scripts.amqp_url),
        cwd=Path(business.shop).parent,
    )
    business.scripts.started.append(script)
    return script


def settle(business: Business) -> tuple[dict[str, int], dict[str, int]]:
    """Let the right scripts do what is left, and return what is booked and what was ordered."""
    business.order("last", 1)
    relay, bookkeeper = business.relay(), business.book()
    bookkeeper.expect(re.compile(r" \[x\] Booked order .* for last"))
    relay.stop()
    bookkeeper.stop()
    booked, ordered = business.balances(), business.balances("--ordered")
    return {a: n for a, n in booked.items() if a != "last"}, {
        a: n for a, n in ordered.items() if a != "last"
    }


@pytest.mark.parametrize(
    ("way", "booked", "ordered"),
    [
        ("publish-first", {"alice": 10, "carol": 10}, {"alice": 10}),
        ("commit-first", {"alice": 10}, {"alice": 10, "dave": 10}),
        ("remove-first", {}, {"alice": 10}),
    ],
)
def test_a_wrong_shop_books_what_nobody_ordered_or_loses_an_order(
    business: Business, way: str, booked: dict[str, int], ordered: dict[str, int]
) -> None:
    """Publish and then commit; commit and then publish; remove a message before its confirm."""
    business.order("alice", 10)
    crashed = wrong(business, way)
    assert crashed.wait() == KILLED
    assert crashed.err.seen[0].startswith(" [!] Crash: ")
    assert settle(business) == (booked, ordered)


def test_an_acknowledgement_before_the_commit_loses_an_order(business: Business) -> None:
    """RabbitMQ has deleted the message when the consumer crashes."""
    business.order("alice", 10)
    relay = business.relay()
    eventually(lambda: business.outbox() == [], "it is published")
    relay.stop()
    assert wrong(business, "acknowledge-first").wait() == KILLED
    assert settle(business) == ({}, {"alice": 10})


def test_two_consumers_that_look_first_book_an_order_twice(business: Business) -> None:
    """SELECT, the work, and INSERT are three transactions. Both consumers look before one has
    written, so both book the order."""
    bookkeeper = business.book()  # makes the tables
    bookkeeper.expect(WAITING)
    bookkeeper.stop()
    business.order("alice", 10)
    assert business.relay("--crash", "after-confirm").wait() == KILLED
    relay = business.relay()
    eventually(lambda: business.outbox() == [], "it is published twice")
    relay.stop()
    both = [wrong(business, "select-first") for _ in range(2)]
    for script in both:
        assert script.wait() == 0
        assert [line.split()[1] for line in script.out.seen] == ["Order", "Booked"]
    assert settle(business) == ({"alice": 20}, {"alice": 10})


# --- What all scripts promise ---


def test_the_scripts_of_this_stage_need_at_most_pika() -> None:
    """Nothing of this project, and nothing else that would have to be installed."""
    for name in (RELAY, BOOK, WRONG):
        assert imported_by(name) - sys.stdlib_module_names == {"pika"}
    for name in (ORDER, BALANCES):
        assert imported_by(name) <= sys.stdlib_module_names


def test_the_scripts_of_this_stage_explain_themselves(scripts: Scripts) -> None:
    """--help needs no RabbitMQ. What a script does not know is a usage line and exit status 2."""
    nobody = replaced(scripts.amqp_url, port=free_port())
    start = partial(scripts.start, amqp_url=nobody)
    strange = (["extra"], ["--together", "0"], ["--together", "x"], ["--crash", "now"])
    all_shown = {name: start(name, "--help") for name in (ORDER, RELAY, BOOK, BALANCES, WRONG)}
    all_refused = [start(name, *words) for name in (RELAY, BOOK) for words in strange]
    for name, shown in all_shown.items():
        assert shown.wait() == 0
        assert shown.out.seen[0].startswith(f"usage: {shown.path.name} ")
        purpose = ast.get_docstring(ast.parse((ROOT / name).read_text()))
        assert str(purpose) in " ".join(" ".join(shown.out.seen).split())
    for refused in all_refused:
        assert refused.wait() == 2
        assert refused.err.seen[-1].startswith(f"{refused.path.name}: error: ")


def test_the_shared_lines_are_the_same_here() -> None:
    """book.py ends like every consumer, and wrong_ways.py like every producer. relay.py ends like a
    consumer, but for the lines that consume."""
    assert parts_of(BOOK) == parts_of("hello_world/receive.py")
    assert parts_of(WRONG) == parts_of("hello_world/send.py")
    texts = [(ROOT / name).read_text() for name in ("hello_world/receive.py", RELAY)]
    theirs, ours = (text[text.index("def connect():") :].splitlines() for text in texts)
    assert len([line for line in theirs if line not in ours]) <= 5
    assert len([line for line in ours if line not in theirs]) <= 3
    texts = [(ROOT / name).read_text() for name in (ORDER, RELAY, BOOK, WRONG)]
    helpers = [re.search(r"@contextmanager\n.*?\n\n\n", text, re.DOTALL) for text in texts]
    assert len({helper[0] for helper in helpers if helper}) == 1
    assert all(helpers)


@pytest.mark.parametrize("name", [RELAY, BOOK])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_script_of_this_stage_stops_at_once(
    business: Business, name: str, how: signal.Signals
) -> None:
    """With status 0, without a line, while it waits for orders, and while it waits for RabbitMQ."""
    database = business.shop if name == RELAY else business.bank
    nobody = replaced(business.scripts.amqp_url, port=free_port())
    running = business.scripts.start(name, "--database", database)
    running.expect(WAITING)
    waiting = business.scripts.start(name, "--database", database, amqp_url=nobody)
    waiting.expect_error(LOST)
    for script in (running, waiting):
        assert script.stop(how) < 1
        assert script.process.returncode == 0
    assert running.err.seen == []


def test_what_fails_is_one_line(business: Business, tmp_path: Path) -> None:
    """A wrong password, a database that is none, a folder that is not there, a full disk."""
    (tmp_path / "text").write_text("This is not a database. " * 100)
    wrong_password = replaced(business.scripts.amqp_url, user=f"guest:{SECRET}")
    for name, words in {ORDER: ("alice", "1"), RELAY: (), BOOK: (), BALANCES: ()}.items():
        for path, why in (
            (tmp_path / "text", "file is not a database"),
            (tmp_path / "no" / "folder", "unable to open database file"),
        ):
            script = business.scripts.start(name, "--database", str(path), *words)
            assert one_line(script) == f" [!] {str(path)!r}: {why}"
        database = business.shop if name in (ORDER, RELAY) else business.bank
        words = ("--database", database, *words)
        if name in (RELAY, BOOK):
            script = business.scripts.start(name, *words, amqp_url=wrong_password)
            assert "ACCESS_REFUSED" in one_line(script)
        if name != BALANCES:
            with open("/dev/full", "wb") as full:
                script = business.scripts.start(name, *words, stdout=full.fileno())
            assert one_line(script) == " [!] [Errno 28] No space left on device"
    assert "There is no message in the queue" in one_line(wrong(business, "acknowledge-first"))


def test_a_database_that_is_in_use_is_waited_for(business: Business) -> None:
    """While another process writes, an order waits, and is not refused."""
    business.order("alice", 1)
    with closing(sqlite3.connect(business.shop)) as shop:
        shop.execute("BEGIN EXCLUSIVE")
        waiting = business.scripts.start(ORDER, "--database", business.shop, "bob", "1")
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        shop.rollback()
    assert waiting.wait() == 0


# --- Endurance and speed ---


@pytest.mark.endurance
@pytest.mark.timeout(900)
def test_two_thousand_orders_under_fire(
    own_broker: Broker, business: Business, record_property: Callable[[str, object], None]
) -> None:
    """Order takers, relays, consumers and RabbitMQ are killed 60 times at random moments, while
    2,000 orders pass. Each order is booked once, and only once.

    Each order has an account of its own, and an amount of its own, so a second booking of one and
    a missing booking of another cannot make up for each other.
    """
    rng = random.Random(19)
    target = 2000
    business.order("first", 1)
    relays = Crew(business.scripts, 2, RELAY, "--database", business.shop)
    bookkeepers = Crew(business.scripts, 3, BOOK, "--database", business.bank)
    for script in [*relays.members, *bookkeepers.members]:
        script.expect(WAITING)
    own_broker.sync()
    numbers = count(1)
    lock = threading.Lock()
    killed: Counter[str] = Counter()
    kill_takers = set(rng.sample(range(target), 25))
    told: list[str] = []

    def take_orders() -> None:
        while True:
            with lock:
                number = next(numbers)
                delay = rng.uniform(0, 0.15)
            if number > target + len(kill_takers):
                return
            command = (ORDER, "--database", business.shop, f"account-{number}", str(number))
            script = business.scripts.start(*command)
            if number in kill_takers:
                time.sleep(delay)
                script.kill()
                killed["order takers"] += 1
            else:
                assert script.wait() == 0, str(script)
            told.extend(line.split()[2].rstrip(":") for line in script.out.seen)
            business.scripts.started.remove(script)

    booked = 0
    kill_at = sorted(rng.sample(range(1, target - 50), 35))
    with ThreadPoolExecutor() as threads:
        takers = [threads.submit(take_orders) for _ in range(3)]
        for _number, line in bookkeepers.read():
            booked += line.startswith(" [x] Booked ")
            while kill_at and booked >= kill_at[0]:
                kill_at.pop(0)
                if len(kill_at) % 7 == 3:
                    own_broker.kill()
                    own_broker.start()
                    killed["brokers"] += 1
                else:
                    crew = rng.choice([relays, bookkeepers])
                    crew.kill_one(rng)
                    killed["relays" if crew is relays else "consumers"] += 1
            if not kill_at:
                break  # the order takers go on to the last order
    for taker in takers:
        taker.result()
    business.expect_booked()
    eventually(lambda: business.outbox() == [], "the outbox is empty")
    orders = business.orders()
    lines = [line for each in bookkeepers.everyone for line in each.out.seen]
    record_property(
        "orders under fire",
        f"{len(orders)} orders, each booked once; "
        f"{sum('is booked already' in line for line in lines)} messages came again; killed: "
        + ", ".join(f"{number} {who}" for who, number in killed.items()),
    )
    assert len(orders) >= target
    assert {order_id for order_id, _, _ in orders} >= set(told)
    assert sum(killed.values()) == 60
    assert killed["brokers"] == 5
    assert relays.complaints() == bookkeepers.complaints() == []


@pytest.mark.speed
def test_what_once_costs(
    business: Business, channel: BlockingChannel, record_property: Callable[[str, object], None]
) -> None:
    """Relay and consumer, with one transaction a message and with one for fifty, beside the plain
    ways of lesson 2: one confirm a task, one acknowledgement a task. They take turns, and it is the
    best of five: whatever else runs on the machine makes each of them slower."""
    number = 500
    business.order("alice", 1)
    channel.queue_declare("orders", durable=True)
    channel.queue_declare("task_queue", durable=True)

    def rate(script: Script, pattern: str, last: Callable[[], bool]) -> float:
        eventually(last, f"{script.name} is done", 60)
        times = [
            at
            for at, line in zip(script.out.times, script.out.seen, strict=True)
            if re.match(pattern, line)
        ]
        script.kill()
        return (len(times) - 1) / (times[-1] - times[0])

    def relay(together: str) -> float:
        business.take_orders(number)
        script = business.relay("--together", together)
        return rate(script, r" \[x\] Published", lambda: business.outbox() == [])

    def book(together: str) -> float:
        for _ in range(number):
            send(channel, b'{"account": "alice", "amount": 10}', str(uuid.uuid4()))
        script = business.book("--together", together)
        return rate(script, r" \[x\] Booked", lambda: len(script.out.seen) > number)

    def confirm() -> float:
        plain = ("tools/bench/plain.py", "--confirm", str(number))
        script = business.scripts.run(*plain)
        begin, end = script.out.times
        channel.queue_purge("task_queue")
        return number / (end - begin)

    def work(prefetch: str) -> float:
        for _ in range(number):
            channel.basic_publish("", "task_queue", b"task", pika.BasicProperties(delivery_mode=2))
        script = business.scripts.start("work_queues/worker.py", "--prefetch", prefetch)
        return rate(script, r" \[x\] Done", lambda: len(script.out.seen) > 2 * number)

    ways: dict[str, Callable[[], float]] = {
        "lesson 2, one confirm a task": confirm,
        "relay.py --together 1": lambda: relay("1"),
        "relay.py": lambda: relay("50"),
        "lesson 2, worker.py": lambda: work("1"),
        "lesson 2, worker.py --prefetch 50": lambda: work("50"),
        "book.py --together 1": lambda: book("1"),
        "book.py": lambda: book("50"),
    }
    figures: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(5):
        for way, run in ways.items():
            figures[way].append(run())
    for way, rates in figures.items():
        record_property(way, f"{max(rates):,.0f} per second")
    for name in ("relay.py", "book.py"):
        assert max(figures[name]) > max(figures[f"{name} --together 1"])
