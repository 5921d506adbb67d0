"""Once: each order is booked, and none is booked twice, whatever crashes when.

The lesson plays each crash that has an option, and the wrong ways with their balances. Here
scripts, connections and RabbitMQ end at other moments.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from tests.proxy import ACK, Proxy
from tests.scripts import (
    LOST,
    RECEIVE,
    SEND,
    Crew,
    Record,
    Script,
    Scripts,
    one_line,
    size,
    take,
    usage_error,
)
from tests.test_all_scripts import parts_of
from tools import ROOT
from tools.broker import Broker, eventually

ORDER, RELAY, BOOK = "once/order.py", "once/relay.py", "once/book.py"
BALANCES, WRONG = "once/balances.py", "once/wrong_ways.py"
WAITING = " [*] Waiting for orders. To exit press CTRL+C"
TEN_FOR_ALICE = b'{"account": "alice", "amount": 10}'


class Business:
    """A shop and a bank, each with a database, and the scripts that work for them."""

    def __init__(self, scripts: Scripts, folder: Path) -> None:
        self.scripts = scripts
        self.shop = str(folder / "shop.db")
        self.bank = str(folder / "bank.db")

    def command(self, script: str, *options: str) -> tuple[str, ...]:
        """Return a script, its database, and its options."""
        database = self.shop if script in (ORDER, RELAY) else self.bank
        return script, "--database", database, *options

    def start(self, script: str, *options: str | bytes, amqp_url: str | None = None) -> Script:
        """Start the script. The relay and the consumer then wait for orders."""
        started = self.scripts.start(*self.command(script), *options, amqp_url=amqp_url)
        if script in (RELAY, BOOK):
            started.expect(WAITING)
        return started

    def order(self, account: str = "alice", amount: int = 1) -> None:
        """Take an order with order.py."""
        self.scripts.run(*self.command(ORDER, account, str(amount)))

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

    def rows(self, path: str, query: str) -> list[tuple[object, ...]]:
        """Look into a database."""
        with closing(sqlite3.connect(path, timeout=30)) as database:
            return database.execute(query).fetchall()

    def orders(self) -> list[str]:
        """Return the ids of the orders that the shop has taken, in their order."""
        query = "SELECT order_id FROM orders ORDER BY rowid"
        return [str(row[0]) for row in self.rows(self.shop, query)]

    def outbox(self) -> list[str]:
        """Return the ids of the messages that are not published yet, in their order."""
        query = "SELECT message_id FROM outbox ORDER BY number"
        return [str(row[0]) for row in self.rows(self.shop, query)]

    def expect_published(self) -> None:
        """Wait until no message is in the outbox."""
        eventually(lambda: not self.outbox(), "the outbox is empty")

    def balances(self, *options: str, database: str = "") -> dict[str, int]:
        """Return what balances.py prints."""
        run = self.scripts.run(BALANCES, "--database", database or self.bank, *options)
        return {account: int(amount) for account, amount in map(str.split, run.out.seen)}

    def expect_booked(self) -> None:
        """Wait until every order is booked, and see that the balances are those of the orders."""
        booked = "SELECT order_id FROM booked"
        every = set(self.orders())
        eventually(lambda: {row[0] for row in self.rows(self.bank, booked)} == every, "booked", 60)
        assert self.balances() == self.balances("--ordered", database=self.shop)


@pytest.fixture
def business(scripts: Scripts, tmp_path: Path) -> Business:
    """A business that has just opened."""
    return Business(scripts, tmp_path)


def ids(channel: BlockingChannel) -> list[str]:
    """Take all messages out of the queue, and return their ids."""
    return [str(take(channel, "orders")[0].message_id) for _ in range(size(channel, "orders"))]


def send(
    channel: BlockingChannel, message_id: str | None, body: bytes = TEN_FOR_ALICE, times: int = 1
) -> None:
    """Put a message into the queue, so many times."""
    properties = pika.BasicProperties(message_id=message_id, app_id="shop")
    channel.queue_declare("orders", durable=True)
    for _ in range(times):
        channel.basic_publish("", "orders", body, properties)


# --- An order and its message ---


def test_an_order_taker_killed_at_any_moment_leaves_both_or_neither(business: Business) -> None:
    """Twenty of them are killed at random moments. What one has printed is there, too."""
    rng = random.Random(1)
    business.order()
    begin = time.monotonic()
    business.order()
    duration = time.monotonic() - begin
    told: set[str] = set()
    for _ in range(20):
        script = business.start(ORDER, "alice", "1")
        time.sleep(rng.uniform(0.3, 1.1) * duration)
        script.kill()
        told.update(line.split()[2].rstrip(":") for line in script.out.seen)
    assert business.outbox() == business.orders()
    assert told <= set(business.orders())


def test_many_order_takers_at_once_do_not_disturb_each_other(business: Business) -> None:
    """Ten at a time, while the database is new."""
    with ThreadPoolExecutor(10) as threads:
        list(threads.map(lambda i: business.order(f"a{i}"), range(20)))
    assert len(business.orders()) == len(business.outbox()) == 20


def test_a_database_that_is_in_use_is_waited_for(business: Business) -> None:
    """While another process writes, an order waits, and is not refused."""
    business.order()
    with closing(sqlite3.connect(business.shop)) as shop:
        shop.execute("BEGIN EXCLUSIVE")
        waiting = business.start(ORDER, "bob", "1")
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        shop.rollback()
    assert waiting.wait() == 0


NO_ORDERS: list[tuple[str | bytes, ...]] = [("alice",), ("alice", "--", "-5")]
# The last amount is a digit, but none that everybody can read.
NO_ORDERS += [("alice", n) for n in ("1.5", "0", "1000000001", "9" * 5000, "\u0661")]
NO_ORDERS += [(name, "1") for name in ("two words", "", b"\xff", "alice\n")]


def test_what_is_no_order_is_refused(business: Business) -> None:
    """A usage line that says what is wrong, and exit status 2. Nothing is written."""
    for refused in [business.start(ORDER, *words) for words in NO_ORDERS]:
        assert usage_error(refused).startswith("order.py: error: ")
    assert not Path(business.shop).exists()


# --- The relay ---


def test_the_relay_publishes_what_waits_in_order(
    business: Business, channel: BlockingChannel
) -> None:
    """Orders that were taken before it started, and those that come while it runs. Each message is
    persistent, has the order's id, and leaves the outbox when it is confirmed."""
    business.order("alice", 1)
    business.order("alice", 2)
    relay = business.start(RELAY)
    business.expect_published()
    business.order("bob", 3)
    relay.expect(re.compile(r" \[x\] Published order .*"), count=3)
    assert [line.split()[-1] for line in relay.out.seen[1:]] == business.orders()
    for row in business.rows(business.shop, "SELECT * FROM orders ORDER BY rowid"):
        properties, body = take(channel, "orders")
        assert properties.delivery_mode == 2
        assert (properties.message_id, *json.loads(body).values()) == row


def test_a_message_stays_in_the_outbox_until_it_is_confirmed(
    business: Business, channel: BlockingChannel
) -> None:
    """A relay that is killed while a confirm is on its way, or whose connection is lost then,
    loses nothing."""
    business.order()
    business.take_orders(20)
    expected = business.outbox()
    passed = 6  # how many confirms may pass
    with closing(
        Proxy(business.scripts.amqp_url, lambda *_: proxy.to_client[ACK] <= passed)
    ) as proxy:
        killed = business.start(RELAY, amqp_url=proxy.url)
        eventually(lambda: proxy.to_client[ACK] == 7, "the seventh confirm is on its way")
        killed.kill()
        assert business.outbox() == expected
        passed = 13
        survivor = business.start(RELAY, "--together", "5", amqp_url=proxy.url)
        eventually(lambda: proxy.to_client[ACK] == 14, "the seventh confirm is on its way")
        eventually(lambda: len(business.outbox()) == 16, "the first five are removed")
        passed = 1_000
        proxy.cut()
        survivor.expect_error(LOST)
        business.expect_published()
        assert survivor.process.poll() is None
    published = ids(channel)
    assert list(dict.fromkeys(published)) == expected
    assert max(Counter(published).values()) > 1  # the seventh was in the queue, and not confirmed


def test_two_relays_do_no_harm(business: Business, channel: BlockingChannel) -> None:
    """Each message is published, and the first copies are in order. Some may come twice."""
    business.order()
    relays = [business.start(RELAY, "--together", "7") for _ in range(2)]
    business.take_orders(300)
    business.expect_published()
    for relay in relays:
        assert relay.err.seen == []
        relay.stop()
    assert list(dict.fromkeys(ids(channel))) == business.orders()


def test_a_deleted_queue_is_declared_again(business: Business, channel: BlockingChannel) -> None:
    """A message that no queue takes is not lost: the relay says so, and publishes it again."""
    relay = business.start(RELAY)
    channel.queue_delete("orders")
    business.order()
    relay.expect_error(LOST)
    business.expect_published()
    assert ids(channel) == business.orders()


# --- The consumer ---


def test_a_message_that_comes_several_times_is_booked_once(
    business: Business, channel: BlockingChannel
) -> None:
    """RabbitMQ deals out messages in turn to three consumers. So each of them gets a copy of an
    order that comes three times at about the same time, and many of one that comes thirty times."""
    bookkeepers = [business.start(BOOK, "--together", "3") for _ in range(3)]
    for i in range(300):
        send(channel, f"order-{i}", times=3)
    send(channel, "order-300", times=30)

    def lines() -> list[str]:
        return [line for each in bookkeepers for line in each.out.seen if line != WAITING]

    eventually(lambda: len(lines()) == 930, "all are done")
    assert sum(line.startswith(" [x] Booked order ") for line in lines()) == 301
    assert all(len(each.out.seen) > 1 for each in bookkeepers)
    assert [each.err.seen for each in bookkeepers] == [[], [], []]
    assert business.balances() == {"alice": 3010}


@pytest.mark.parametrize("together", ["1", "50"])
@pytest.mark.parametrize("crash", ["before-commit", "after-commit"])
def test_a_consumer_that_crashes_books_each_order_once(
    business: Business, channel: BlockingChannel, crash: str, together: str
) -> None:
    """Before its commit, nothing is booked; between the commit and the acknowledgement, the
    messages come again, and are booked already."""
    for i in range(3):
        send(channel, f"order-{i}")
    assert business.start(BOOK, "--crash", crash, "--together", together).wait() == -9
    booked = 0 if crash == "before-commit" else 3 if together == "50" else 1
    assert sum(business.balances().values()) == 10 * booked
    bookkeeper = business.start(BOOK)
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
        bookkeeper = business.start(BOOK, amqp_url=proxy.url)
        send(channel, "order-1")
        eventually(lambda: acknowledged == [(10,)], "it is acknowledged")
        proxy.cut()
        bookkeeper.expect_error(LOST)
        bookkeeper.expect(" [x] Order order-1 is booked already")
    assert business.balances() == {"alice": 10}


def test_consumers_killed_at_random_book_each_order_once(business: Business) -> None:
    """Relays and consumers are killed eight times while 400 orders pass."""
    rng = random.Random(2)
    business.order()
    business.take_orders(400, accounts=10)
    relays = Crew(business.scripts, 1, *business.command(RELAY))
    bookkeepers = Crew(business.scripts, 2, *business.command(BOOK, "--together", "5"))
    kill_at = set(rng.sample(range(350), 8))
    for lines, _line in zip(range(max(kill_at) + 1), bookkeepers.read(), strict=False):
        if lines in kill_at:
            (relays if lines % 2 else bookkeepers).kill_one(rng)
    business.expect_booked()
    assert relays.killed + bookkeepers.killed == 8
    assert relays.complaints() == bookkeepers.complaints() == []


NOT_BOOKED: list[tuple[str | None, bytes]] = [(None, TEN_FOR_ALICE), ("two\nlines", TEN_FOR_ALICE)]
NOT_BOOKED += [("id", body) for body in (b"", b"\xff\xfe", b"[" * 100_000, b"[1, 2]", b"null")]
NOT_BOOKED += [("id", b'{"account": "mallory"}'), ("id", b'{"account": ["mallory"], "amount": 10}')]
NOT_BOOKED += [("id", b'{"account": "mall\\ud800ory", "amount": 10}')]
NOT_BOOKED += [
    ("id", b'{"account": "mallory", "amount": %s}' % amount)
    for amount in (b'"10"', b"true", b"-10", b"1.0", b"9" * 5000)
]


def test_what_is_no_order_is_kept_and_blocks_nothing(
    business: Business, channel: BlockingChannel
) -> None:
    """A line on standard error says why. The message is in a table, whole, and the orders before
    and behind it are booked."""
    bookkeeper = business.start(BOOK)
    for message_id, body in [("order-1", TEN_FOR_ALICE), *NOT_BOOKED, ("order-2", TEN_FOR_ALICE)]:
        send(channel, message_id, body)
    bookkeeper.expect(" [x] Booked order order-2: 10 for alice")
    bookkeeper.expect_error(re.compile(r" \[!\] Not an order.*"), count=len(NOT_BOOKED))
    assert len(bookkeeper.err.seen) == len(NOT_BOOKED)
    assert business.balances() == {"alice": 20}
    assert business.rows(business.bank, "SELECT * FROM not_booked ORDER BY rowid") == [
        (ascii(pika.BasicProperties(message_id=message_id, app_id="shop")), body)
        for message_id, body in NOT_BOOKED
    ]
    bookkeeper.stop()
    assert size(channel, "orders") == 0


# --- What all scripts promise ---


def test_the_scripts_of_this_stage_need_at_most_pika() -> None:
    """Nothing of this project, and nothing else that would have to be installed. order.py speaks
    to a database, and to nobody else."""
    for name in (ORDER, RELAY, BOOK, BALANCES, WRONG):
        script = (ROOT / name).read_text()
        imported = set(re.findall(r"^ *(?:import|from) (\w+)", script, re.MULTILINE))
        speaks_to_rabbitmq = name in (RELAY, BOOK, WRONG)
        assert imported - sys.stdlib_module_names == ({"pika"} if speaks_to_rabbitmq else set())
        assert "socket" not in imported


def test_the_scripts_of_this_stage_explain_themselves(business: Business) -> None:
    """--help needs no RabbitMQ. What a script does not know is a usage line and exit status 2."""
    start = business.scripts.start
    for shown in [start(n, "--help", amqp_url="") for n in (ORDER, RELAY, BOOK, BALANCES, WRONG)]:
        assert shown.wait() == 0
        purpose = shown.path.read_text().split('"""')[1]
        assert purpose in " ".join(" ".join(shown.out.seen).split())
    strange = (["extra"], ["--together", "0"], ["--together", "x"], ["--crash", "now"])
    for refused in [start(name, *words) for name in (RELAY, BOOK) for words in strange]:
        assert usage_error(refused).startswith(f"{refused.path.name}: error: ")


def test_the_shared_lines_are_the_same_here() -> None:
    """book.py ends like every consumer, and wrong_ways.py like every producer. relay.py ends like a
    consumer, but for the lines that consume. All of them open a database in the same way."""
    assert parts_of(BOOK) == parts_of(RECEIVE)
    assert parts_of(WRONG) == parts_of(SEND)
    assert parts_of(RELAY)[0] == parts_of(RECEIVE)[0]  # what is done with signals
    texts = [(ROOT / name).read_text() for name in (RECEIVE, RELAY)]
    theirs, ours = (set(text.partition("\ndef connect():")[2].splitlines()) for text in texts)
    assert len(theirs - ours) <= 5
    assert len(ours - theirs) <= 3
    texts = [(ROOT / name).read_text() for name in (ORDER, RELAY, BOOK, WRONG)]
    helpers = [re.findall(r"@contextmanager\n.*?\n\n\n", text, re.DOTALL) for text in texts]
    assert helpers == [helpers[0]] * 4
    assert len(helpers[0]) == 1


def test_what_fails_is_one_line(business: Business, tmp_path: Path) -> None:
    """A database that is none, a folder that is not there, a full disk, an empty queue."""
    start = business.scripts.start
    (tmp_path / "text").write_text("This is not a database. " * 100)
    paths = {tmp_path / "text": "file is not a database"}
    paths[tmp_path / "no" / "folder"] = "unable to open database file"
    for name, words in {ORDER: ("alice", "1"), RELAY: (), BOOK: (), BALANCES: ()}.items():
        for path, why in paths.items():
            script = start(name, "--database", str(path), *words)
            assert one_line(script) == f" [!] {str(path)!r}: {why}"
    with open("/dev/full", "wb") as full:
        script = start(*business.command(ORDER, "alice", "1"), stdout=full)
    assert one_line(script) == " [!] [Errno 28] No space left on device"
    empty = start(WRONG, "acknowledge-first")
    assert one_line(empty) == " [!] There is no message in the queue 'orders'"


# --- Endurance and speed ---


@pytest.mark.endurance
@pytest.mark.timeout(900)
def test_two_thousand_orders_under_fire(
    own_broker: Broker, business: Business, record_property: Record
) -> None:
    """Order takers, relays, consumers and RabbitMQ are killed 60 times at random moments, while
    2,000 orders pass. Each order is booked once, and only once.

    Each order has an account of its own, and an amount of its own, so a second booking of one and
    a missing booking of another cannot make up for each other.
    """
    rng = random.Random(19)
    target = 2000
    business.order("first")
    relays = Crew(business.scripts, 2, *business.command(RELAY))
    bookkeepers = Crew(business.scripts, 3, *business.command(BOOK))
    for script in [*relays.members, *bookkeepers.members]:
        script.expect(WAITING)
    own_broker.sync()
    killed: Counter[str] = Counter()
    killed_takers = set(rng.sample(range(target), 25))
    told: set[str] = set()

    def take_order(number: int) -> None:
        script = business.start(ORDER, f"account-{number}", str(number + 1))
        if number in killed_takers:
            time.sleep(rng.uniform(0, 0.15))
            script.kill()
            killed["order takers"] += 1
        else:
            assert script.wait() == 0, str(script)
        told.update(line.split()[2].rstrip(":") for line in script.out.seen)
        business.scripts.started.remove(script)

    booked = 0
    kill_at = sorted(rng.sample(range(1, target - 50), 35))
    with ThreadPoolExecutor(3) as takers:
        taken = takers.map(take_order, range(target + len(killed_takers)))
        for _number, line in bookkeepers.read():
            booked += line.startswith(" [x] Booked ")
            while kill_at and booked >= kill_at[0]:
                kill_at.pop(0)
                if len(kill_at) % 7 == 3:
                    own_broker.kill()
                    own_broker.start()
                    killed["brokers"] += 1
                else:
                    rng.choice([relays, bookkeepers]).kill_one(rng)
            if not kill_at:
                break  # the order takers go on to the last order
        list(taken)  # raises what went wrong there
    business.expect_booked()
    business.expect_published()
    killed |= {"relays": relays.killed, "consumers": bookkeepers.killed}
    lines = [line for each in bookkeepers.everyone for line in each.out.seen]
    record_property(
        "orders under fire",
        f"{len(business.orders())} orders, each booked once; "
        f"{sum('is booked already' in line for line in lines)} messages came again; killed: "
        + ", ".join(f"{number} {who}" for who, number in killed.items()),
    )
    assert len(business.orders()) >= target
    assert told <= set(business.orders())
    assert sum(killed.values()) == 60
    assert killed["brokers"] == 5
    assert relays.complaints() == bookkeepers.complaints() == []


@pytest.mark.speed
def test_what_once_costs(
    business: Business, channel: BlockingChannel, record_property: Record
) -> None:
    """Relay and consumer, with one transaction a message and with one for fifty, beside the plain
    ways of lesson 2: one confirm a task, one acknowledgement a task. They take turns, and it is the
    best of five: whatever else runs on the machine makes each of them slower."""
    number = 500
    business.order()
    channel.queue_declare("task_queue", durable=True)

    def rate(script: Script, beginning: str) -> float:
        """Return how many lines in a second begin so, from the first to the last."""

        def times() -> list[float]:
            lines = list(zip(script.out.seen, script.out.times, strict=False))
            return [when for line, when in lines if line.startswith(beginning)]

        eventually(lambda: len(times()) >= number, f"{script.name} is done", 60)
        business.expect_published()
        script.kill()
        return (number - 1) / (times()[number - 1] - times()[0])

    def relay(*options: str) -> float:
        business.take_orders(number)
        return rate(business.start(RELAY, *options), " [x] Published")

    def book(*options: str) -> float:
        channel.queue_purge("orders")
        for _ in range(number):
            send(channel, str(uuid.uuid4()))
        return rate(business.start(BOOK, *options), " [x] Booked")

    def confirm() -> float:
        begin, end = business.scripts.run(
            "tools/bench/clients/with_pika.py", "publish", str(number), "confirmed"
        ).out.times
        channel.queue_purge("task_queue")
        return number / (end - begin)

    def work(*options: str) -> float:
        for _ in range(number):
            channel.basic_publish("", "task_queue", b"task", pika.BasicProperties(delivery_mode=2))
        return rate(business.scripts.start("work_queues/worker.py", *options), " [x] Done")

    ways: dict[str, Callable[[], float]] = {
        "lesson 2, one confirm a task": confirm,
        "relay.py --together 1": lambda: relay("--together", "1"),
        "relay.py": relay,
        "lesson 2, worker.py": work,
        "lesson 2, worker.py --prefetch 50": lambda: work("--prefetch", "50"),
        "book.py --together 1": lambda: book("--together", "1"),
        "book.py": book,
    }
    rounds = [{way: run() for way, run in ways.items()} for _ in range(5)]
    best = {way: max(rates[way] for rates in rounds) for way in ways}
    for way, figure in best.items():
        record_property(way, f"{figure:,.0f} per second")
    assert best["relay.py"] > best["relay.py --together 1"]
    assert best["book.py"] > best["book.py --together 1"]
