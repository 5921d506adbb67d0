"""In production: a worker that is stopped without harm, and that can be watched."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pika
import pytest
import requests
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import BasicProperties

from tests.proxy import ACK, Proxy
from tests.scripts import (
    SECRET,
    Script,
    Scripts,
    failures_of,
    listing,
    one_line,
    parked,
    replaced,
    size,
    take,
    usage_error,
)
from tools import ROOT
from tools.broker import Broker, eventually, free_port, virtual_host_of

WORKER, NEW_TASK = "service/worker.py", "service/new_task.py"
DEFINITIONS = json.loads((ROOT / "service/definitions.json").read_text())
AT_ONCE = 10  # seconds, on a busy machine; a worker that waits for its task needs 25
EVENT = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (INFO|WARNING|ERROR|CRITICAL) (\S+) (.*)"
)


@pytest.fixture
def queues(broker: Broker, amqp_url: str) -> None:
    """Load the queues and policies of definitions.json, with a delay of 0.3 s between two tries."""
    broker.api("POST", f"definitions/{virtual_host_of(amqp_url)}", DEFINITIONS)
    set_policy(broker, amqp_url, "tasks.retry", **{"message-ttl": 300})


pytestmark = pytest.mark.usefixtures("queues")


def set_policy(broker: Broker, amqp_url: str, name: str, **settings: object) -> None:
    """Change settings in a policy of definitions.json, as `rabbitmqctl set_policy` does."""
    [policy] = [each for each in DEFINITIONS["policies"] if each["name"] == name]
    new = policy | {"definition": policy["definition"] | settings}
    broker.api("PUT", f"policies/{virtual_host_of(amqp_url)}/{name}", new)


def event(text: str, task: str = "-") -> re.Pattern[str]:
    """Return the pattern of a line of the log: text may be its beginning."""
    return re.compile(rf"\S+ [A-Z]+ {re.escape(task)} {re.escape(text)}.*")


def worker(scripts: Scripts, *options: str, **more: Any) -> Script:
    """Start a worker and wait until it waits for tasks."""
    started = scripts.start(more.pop("script", WORKER), *options, **more)
    started.expect_error(event("waiting for tasks"))
    return started


def put(channel: BlockingChannel, task: str, seconds: float = 0, **more: Any) -> None:
    """Put a task into the queue, as new_task.py does, with an id of our choice."""
    body = json.dumps({"name": task, "seconds": seconds}).encode()
    put_body(channel, body, message_id=task, **more)


def put_body(channel: BlockingChannel, body: bytes, **properties: Any) -> None:
    its = BasicProperties(**{"delivery_mode": 2} | properties)
    channel.basic_publish("", "tasks", body, its, mandatory=True)


def begun(
    scripts: Scripts, channel: BlockingChannel, seconds: float, *options: str, **more: Any
) -> Script:
    """Start a worker, and wait until it has begun a task that takes so long."""
    doing = worker(scripts, *options, **more)
    put(channel, "long", seconds)
    doing.expect_error(event("begins", "long"))
    return doing


def asked_to_stop(doing: Script, how: signal.Signals = signal.SIGTERM) -> Script:
    """Send a signal to a worker, and wait until it says that it stops."""
    doing.process.send_signal(how)
    doing.expect_error(event("stopping"))
    return doing


@contextmanager
def connection_to(amqp_url: str) -> Iterator[BlockingChannel]:
    """Give a channel for a moment: that of the test would not outlive a restart of RabbitMQ."""
    with closing(pika.BlockingConnection(pika.URLParameters(amqp_url))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel


def taken_back(channel: BlockingChannel) -> dict[str, Any]:
    """Wait for a task that goes back, take it, and return its headers and whether it was out."""
    [(method, properties, _)] = eventually(
        lambda: [got for got in [channel.basic_get("tasks", auto_ack=True)] if got[0]],
        "a task goes back",
    )
    return {"redelivered": method.redelivered} | (properties.headers or {})


# --- Stopping ---


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl+C"])
def test_a_worker_that_is_stopped_finishes_its_task_first(
    broker: Broker, scripts: Scripts, channel: BlockingChannel, how: signal.Signals
) -> None:
    """It takes no other task, finishes the one in hand, acknowledges it, and ends with 0.

    The tasks that it has prefetched go back at once, and another worker does them meanwhile. From
    RabbitMQ 4.3 on, this does not count as a failed delivery.
    """
    doing = begun(scripts, channel, 2, "--prefetch", "3")
    put(channel, "second")
    put(channel, "third")
    eventually(lambda: size(channel, "tasks") == 0, "both are prefetched")
    asked_to_stop(doing, how)
    headers = [taken_back(channel) for _ in range(2)]
    if broker.release >= (4, 3):
        assert all(not each.get("x-delivery-count") for each in headers)
    put(channel, "fourth")
    assert doing.wait() == 0
    texts = [line.split(maxsplit=3)[3].partition(" in ")[0] for line in doing.err.seen]
    assert texts == ["waiting for tasks", "begins", "stopping: no more tasks", "done", "stopped"]
    assert not taken_back(channel)["redelivered"], "the fourth was never taken"
    assert size(channel, "tasks") == 0, "and the first was acknowledged"


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "not connected"])
def test_an_idle_worker_ends_at_once(scripts: Scripts, connected: bool) -> None:
    """No task, nothing to wait for: also while it tries to reconnect, it ends with 0."""
    url = scripts.amqp_url if connected else replaced(scripts.amqp_url, port=free_port())
    doing = scripts.start(WORKER, amqp_url=url)
    doing.expect_error(event("waiting for tasks" if connected else "trying again every second"))
    assert doing.stop(signal.SIGTERM) < AT_ONCE
    assert doing.process.returncode == 0


@pytest.mark.parametrize(("grace", "signals"), [("25", 2), ("1", 1)])
def test_a_second_signal_or_too_long_a_task_ends_a_worker(
    scripts: Scripts, channel: BlockingChannel, grace: str, signals: int
) -> None:
    """It waits for as long as --grace says, and not longer; after a second signal, not at all. The
    task in hand goes back to its queue. The exit status says that something was cut off."""
    doing = begun(scripts, channel, 60, "--grace", grace)
    begin = time.monotonic()
    asked_to_stop(doing)
    if signals == 2:
        doing.process.send_signal(signal.SIGTERM)
    assert doing.wait() == 1
    assert (signals == 1) <= time.monotonic() - begin < AT_ONCE
    assert any(event("no time left").fullmatch(line) for line in doing.err.seen) == (signals == 1)
    assert taken_back(channel)["redelivered"]


def test_a_connection_that_breaks_during_the_stop_does_no_harm(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """The worker finishes its work and ends with 0. The task goes back, as nobody could tell
    RabbitMQ that it was done."""
    with closing(Proxy(scripts.amqp_url)) as proxy:
        doing = begun(scripts, channel, 2, amqp_url=proxy.url)
        begin = time.monotonic()
        asked_to_stop(doing)
        proxy.close()
        assert doing.wait() == 0
        assert time.monotonic() - begin > 1
        assert taken_back(channel)["redelivered"]


def test_a_worker_that_loses_its_connection_connects_again_while_its_work_goes_on(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """The task is delivered again, and the worker begins it when the first try has ended."""
    with closing(Proxy(scripts.amqp_url)) as proxy:
        doing = begun(scripts, channel, 3, amqp_url=proxy.url)
        proxy.cut()
        doing.expect_error(event("begins (redelivered)", "long"))
        doing.expect_error(event("done", "long"))
        seconds = float(doing.err.seen[-1].split()[-2])  # since it was delivered again
        assert seconds > 3.5
        assert size(channel, "tasks") == 0


@pytest.mark.parametrize("busy", [True, False], ids=["with a task", "without a task"])
def test_a_worker_can_be_stopped_while_rabbitmq_is_paused(
    scripts: Scripts, channel: BlockingChannel, busy: bool
) -> None:
    """RabbitMQ answers nothing any more. The worker waits for it as long as --grace says. If
    RabbitMQ goes on before that, the stop is like any other."""
    goes_on = threading.Event()
    goes_on.set()
    with closing(Proxy(scripts.amqp_url, lambda *_: goes_on.wait())) as proxy:
        for grace, status in (("1", 1), ("25", 0)):
            doing = worker(scripts, "--grace", grace, amqp_url=proxy.url)
            if busy:
                put(channel, grace, 0.5)
                doing.expect_error(event("begins", grace))
            goes_on.clear()
            asked_to_stop(doing)
            if status == 0:
                goes_on.set()
            assert doing.wait() == status
            goes_on.set()
            proxy.cut()
            if busy and status == 1:
                assert taken_back(channel)["redelivered"]
        assert size(channel, "tasks") == 0


def roll(scripts: Scripts, rounds: int, pause: Callable[[int], object]) -> list[Script]:
    """Let three workers do tasks, and replace one after the other, so often, with a pause after
    each. When all tasks are taken, stop the workers. Return all that there were."""
    crew = [worker(scripts) for _ in range(3)]
    everyone = list(crew)
    for i in range(rounds):
        new = worker(scripts)  # as a deployment does it: the new one runs before the old one ends
        everyone.append(new)
        asked_to_stop(crew[i % 3])
        crew[i % 3] = new
        pause(i)
    with connection_to(scripts.amqp_url) as channel:
        waiting = ("tasks", "tasks.retry")
        eventually(lambda: not any(size(channel, name) for name in waiting), "all are taken", 180)
        for old in crew:
            old.process.send_signal(signal.SIGTERM)
        assert [each.wait() for each in everyone] == [0] * len(everyone)
        assert [size(channel, name) for name in (*waiting, "tasks.parked")] == [0, 0, 0]
    return everyone


def events(everyone: list[Script], beginning: str) -> Counter[str]:
    """Count the events whose text begins so, for each message id."""
    found = (EVENT.fullmatch(line) for each in everyone for line in each.err.seen)
    return Counter(each[2] for each in found if each and each[3].startswith(beginning))


def test_a_rolling_restart_does_nothing_twice(scripts: Scripts, channel: BlockingChannel) -> None:
    """Three workers are replaced one after the other, twice. Each task is begun once, done once,
    and none is parked. (A task that comes at the moment of a stop goes back before it begins.)"""
    for i in range(20):
        put(channel, f"task-{i}", seconds=0.1 + i % 10 / 10)
    everyone = roll(scripts, rounds=6, pause=lambda _: None)
    once = {f"task-{i}": 1 for i in range(20)}
    assert events(everyone, "begins") == events(everyone, "done") == once
    assert sum(events(everyone, "begins (redelivered)").values()) <= 2


@pytest.mark.endurance
@pytest.mark.timeout(600)
def test_thirty_rolling_restarts_and_two_of_rabbitmq(
    own_broker: Broker, scripts: Scripts, amqp_url: str
) -> None:
    """300 tasks of 0.2 to 2 seconds, three workers, each replaced ten times while it works, and
    RabbitMQ is restarted twice. Each task is done. It is done once, unless RabbitMQ was restarted
    while a worker had it. None fails, and none is parked."""
    tasks = {f"task-{i}": 0.2 + i % 19 / 10 for i in range(300)}
    with connection_to(amqp_url) as channel:
        for task, seconds in tasks.items():
            put(channel, task, seconds)
    own_broker.sync()
    away = []  # from when to when RabbitMQ was restarted

    def pause(i: int) -> None:
        if i in (10, 20):
            begin = time.monotonic()
            own_broker.stop()
            own_broker.start()
            away.append((begin, time.monotonic()))
        time.sleep(2)  # until the next one; all tasks together take them two minutes

    everyone = roll(scripts, rounds=30, pause=pause)
    assert events(everyone, "begins").keys() == events(everyone, "done").keys() == tasks.keys()
    times: dict[str, list[float]] = {}  # when each task was begun
    for each in everyone:
        for line, when in zip(each.err.seen, each.err.times, strict=True):
            _, level, task, text = line.split(maxsplit=3)
            assert level != "WARNING", "none fails"
            if text.startswith("begins"):
                times.setdefault(task, []).append(when)
    for its_times in times.values():
        for once, again in pairwise(sorted(its_times)):
            assert any(once < end and begin < again for begin, end in away)


# --- Tasks as data, and tasks that fail ---


def test_new_task_sends_data_that_describe_themselves(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """The body is JSON. The properties say so, and have an id, which is printed, and a time."""
    sent = scripts.run(NEW_TASK, "--seconds", "0.5", "日本 report")
    properties, body = take(channel, "tasks")
    assert json.loads(body) == {"name": "日本 report", "seconds": 0.5}
    assert (properties.content_type, properties.type) == ("application/json", "sleep")
    assert sent.out.all() == [f" [x] Sent '日本 report' with the id {properties.message_id}"]
    assert abs(properties.timestamp - time.time()) < 60
    assert properties.delivery_mode == 2


def test_a_task_without_its_queue_is_an_error(scripts: Scripts, channel: BlockingChannel) -> None:
    """new_task.py says what is missing. A worker waits until it is there."""
    channel.queue_delete("tasks")
    line = one_line(scripts.start(NEW_TASK, "report"))
    assert line == " [!] There is no queue 'tasks': load definitions.json into RabbitMQ"
    doing = scripts.start(WORKER)
    doing.expect_error(
        re.compile(r".* ERROR - trying again every second: .*NOT_FOUND - no queue 'tasks'.*")
    )
    channel.queue_declare("tasks", durable=True, arguments={"x-queue-type": "quorum"})
    doing.expect_error(event("waiting for tasks"))


NO_TASKS = {
    b"": "JSONDecodeError",
    b"\xff": "UnicodeDecodeError",
    b"{": "JSONDecodeError",
    b"[]": "TypeError",
    b"5": "TypeError",
    b"{}": "KeyError('name')",
    b'{"name": "a"}': "KeyError('seconds')",
    b'{"name": "a", "seconds": "x"}': "ValueError",
    b'{"name": "a", "seconds": null}': "TypeError",
    b"[" * 100_000: "RecursionError",
}


def test_what_can_never_be_understood_is_parked_at_its_first_try(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """The body is as it was, and a header says why. The worker goes on."""
    doing = worker(scripts)
    for body in NO_TASKS:
        put_body(channel, body)
    put(channel, "good")
    doing.expect_error(event("done", "good"))
    found = parked(channel)
    assert [body for body, _ in found] == list(NO_TASKS)
    for (_, properties), reason in zip(found, NO_TASKS.values(), strict=True):
        [failure] = failures_of(properties)
        told = re.escape(f"this is not a task: {reason}")
        assert re.match(rf"[0-9-]{{10}} [0-9:]{{8}}\+00:00 PermanentError\(.{told}", failure)


def test_what_failed_for_now_is_tried_again(scripts: Scripts, channel: BlockingChannel) -> None:
    """After three tries it is parked; lesson 8's parked.py lists its failures and sends it back.
    The orders to RabbitMQ that came with it are not carried out again."""
    channel.queue_declare("copies", durable=True)
    doing = worker(scripts)
    orders = {"headers": {"CC": ["copies"], "mine": 1}, "expiration": "60000", "user_id": "guest"}
    put(channel, "bad", -1, **orders)
    put(channel, "good")
    doing.expect_error(event("failed (3 of 3), goes to tasks.parked", "bad"))
    assert events([doing], "begins") == {"bad": 3, "good": 1}
    lines = doing.err.seen
    good = next(i for i, line in enumerate(lines) if event("done", "good").fullmatch(line))
    assert any(event("failed (2", "bad").fullmatch(line) for line in lines[good:])
    eventually(lambda: size(channel, "tasks.parked") == 1, "it is parked")
    shown = listing(scripts, "--send-back")
    assert shown[1:4] == ["     T ValueError('sleep length must be non-negative')"] * 3
    doing.expect_error(event("failed (3 of 3), goes to tasks.parked", "bad"), count=2)
    eventually(lambda: size(channel, "tasks.parked") == 1, "it is parked")
    [(_, properties)] = parked(channel)
    assert properties.expiration is properties.user_id is None
    headers = properties.headers or {}
    assert ("CC" in headers, headers["mine"]) == (False, 1)
    assert size(channel, "copies") == 1


def test_a_failed_task_that_rabbitmq_does_not_take_back_is_parked(
    broker: Broker, amqp_url: str, scripts: Scripts, channel: BlockingChannel
) -> None:
    """If the queue for failed tasks is full, the task becomes a dead letter of its own queue. It
    holds up no other task, and is not lost."""
    set_policy(broker, amqp_url, "tasks.retry", **{"max-length": 1, "message-ttl": 600_000})
    doing = worker(scripts)
    put(channel, "fills", -1)
    doing.expect_error(event("failed (1 of 3), goes to tasks.retry", "fills"))
    for i in range(3):  # RabbitMQ lets a few more in
        put(channel, f"bad-{i}", -1)
    put(channel, "good")
    doing.expect_error(event("done", "good"))
    doing.expect_error(event("RabbitMQ does not take it (NackError", "bad-2"))
    eventually(lambda: size(channel, "tasks.parked") >= 1, "it is parked")
    found = {properties.message_id: properties for _, properties in parked(channel)}
    death = (found["bad-2"].headers or {})["x-death"][0]
    assert (death["queue"], death["reason"]) == ("tasks", "rejected")
    eventually(lambda: size(channel, "tasks.retry") + len(found) == 4, "none is lost")


# --- The log, health and figures ---


def test_each_event_is_one_line_with_time_level_and_message_id(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """A failure has its traceback in the same line. What comes from outside cannot begin a line of
    its own."""
    doing = worker(scripts)
    put(channel, "two\nlines \x1b[31m", -1)
    put_body(channel, b"no id")
    doing.expect_error(event("failed (1 of 3), goes to tasks.parked"))
    lines = [line.replace(r"two\nlines \x1b[31m", "id") for line in doing.err.seen]
    assert all(EVENT.fullmatch(line) for line in lines)
    [text] = [line.partition(" ")[2] for line in lines if "(1 of 3), goes to tasks.retry" in line]
    assert text.startswith("WARNING id failed (1 of 3), goes to tasks.retry: ValueError(")
    assert r"\nTraceback (most recent call last):\n  File " in text
    assert r"in work\n    time.sleep" in text
    assert doing.out.seen == []


def ask(port: str, path: str) -> int:
    """Return the status of an answer."""
    return requests.get(f"http://127.0.0.1:{port}/{path}", timeout=5).status_code


def figures(port: str) -> dict[str, float]:
    """Return the figures of a worker by their names."""
    text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
    rows = (line.rpartition(" ") for line in text.splitlines() if line.startswith("worker_"))
    return {name: float(value) for name, _, value in rows}


def test_health_and_figures_are_true(own_broker: Broker, scripts: Scripts, amqp_url: str) -> None:
    """Ready while it consumes, and not while RabbitMQ is away or while it stops; alive all the
    time. The figures count what was done, failed and parked. The log says in one line that
    RabbitMQ is away, and pika adds nothing."""
    port = str(free_port())
    doing = worker(scripts, "--port", port)
    assert (ask(port, "livez"), ask(port, "readyz"), ask(port, "nothing")) == (200, 200, 404)
    with connection_to(amqp_url) as channel:
        for i in range(4):
            put(channel, f"good-{i}", 0.1)
        put(channel, "bad", -1)
        put_body(channel, b"no task")
    count = {"done": 4, "failed": 2, "parked": 2}
    expected = {f'worker_tasks_total{{result="{result}"}}': n for result, n in count.items()}
    expected["worker_task_seconds_count"] = 8
    eventually(lambda: figures(port).items() >= expected.items(), "the figures")
    assert 0.4 <= figures(port)["worker_task_seconds_sum"] < 8

    own_broker.sync()
    own_broker.stop()
    try:
        doing.expect_error(event("trying again every second"))
        assert (ask(port, "livez"), ask(port, "readyz")) == (200, 503)
    finally:
        own_broker.start()
    doing.expect_error(event("waiting for tasks"), count=2)
    eventually(lambda: ask(port, "readyz") == 200, "it is ready again")
    assert all(EVENT.fullmatch(line) for line in doing.err.seen)
    errors = [line.partition(" ")[2] for line in doing.err.seen if " ERROR " in line]
    assert all(line.startswith("ERROR - trying again every second: ") for line in errors)
    assert all(one != next_one for one, next_one in pairwise(errors)), "no trouble is said twice"

    with connection_to(amqp_url) as channel:
        put(channel, "last", 2)
    doing.expect_error(event("begins", "last"))
    asked_to_stop(doing)
    assert (ask(port, "livez"), ask(port, "readyz")) == (200, 503)
    assert doing.wait() == 0


OWN_THREAD = "executor.submit(do, properties, body)"
PIKAS_THREAD = "executor.submit(time.sleep, do(properties, body) or 0)"


@pytest.mark.parametrize(
    ("work", "seconds", "answer"),
    [(OWN_THREAD, 3, 200), (OWN_THREAD, -1, 200), (PIKAS_THREAD, 3, 503)],
    ids=["a long task", "no confirm", "stuck"],
)
def test_a_worker_is_alive_unless_the_thread_of_pika_is_stuck(
    scripts: Scripts, channel: BlockingChannel, tmp_path: Path, work: str, seconds: int, answer: int
) -> None:
    """A copy of the worker is found stuck after half a second. A RabbitMQ that confirms nothing for
    a while (in an alarm, say) is no reason to restart the worker: that would count as a failed
    delivery of its task."""
    text = (ROOT / WORKER).read_text(encoding="utf-8")
    assert text.count(OWN_THREAD) == text.count("ALIVE = 60") == 1
    copy = tmp_path / "worker.py"
    copy.write_text(text.replace(OWN_THREAD, work).replace("ALIVE = 60", "ALIVE = 0.5"))
    port = str(free_port())
    with closing(Proxy(scripts.amqp_url, lambda i, to_broker: to_broker or i != ACK)) as proxy:
        doing = begun(scripts, channel, seconds, "--port", port, script=copy, amqp_url=proxy.url)
        time.sleep(1)
        eventually(lambda: ask(port, "livez") == answer, f"the answer is {answer}")
        assert event("done", "long").fullmatch(doing.err.seen[-1]) is None
        if seconds > 0:
            doing.expect_error(event("done", "long"))
            eventually(lambda: ask(port, "livez") == 200, "it is alive again")


# --- Settings belong to RabbitMQ ---


def test_settings_change_while_everything_runs(
    broker: Broker, amqp_url: str, scripts: Scripts, channel: BlockingChannel
) -> None:
    """The delay between two tries, the delivery limit, and the queue for dead letters: a policy
    changes each, and no script is changed or ends."""
    doing = worker(scripts)

    def tries() -> int:
        """Send a task that fails, and return how often it is tried within a second."""
        channel.queue_purge("tasks.retry")
        task = f"task-{time.monotonic_ns()}"
        put(channel, task, -1)
        doing.expect_error(event("failed (1 of 3)", task))
        with suppress(AssertionError):
            doing.expect_error(event("failed (3 of 3)", task), timeout=1)
        return events([doing], "begins")[task]

    eventually(lambda: tries() == 3, "a failed task is tried again at once")
    set_policy(broker, amqp_url, "tasks.retry", **{"message-ttl": 600_000})
    eventually(lambda: tries() == 1, "a failed task waits for ten minutes")
    set_policy(broker, amqp_url, "tasks.retry", **{"message-ttl": 100})
    eventually(lambda: tries() == 3, "a failed task is tried again at once")
    assert events([doing], "waiting for tasks") == {"-": 1}

    channel.queue_declare("elsewhere", durable=True, arguments={"x-queue-type": "quorum"})
    elsewhere = {"dead-letter-routing-key": "elsewhere", "delivery-limit": 1}
    set_policy(broker, amqp_url, "tasks", **elsewhere)
    doing.kill()
    begun(scripts, channel, 60).kill()
    second = worker(scripts)
    second.expect_error(event("begins (redelivered)", "long"))
    second.kill()
    eventually(lambda: size(channel, "elsewhere") == 1, "it is where the policy says")


def test_each_setting_in_the_definitions_is_a_policy() -> None:
    """The only argument of the queues is their type, which cannot be a policy. No user and no
    password is in the file, and no script declares a queue."""
    only_type = {"x-queue-type": "quorum"}
    assert all(queue["arguments"] == only_type for queue in DEFINITIONS["queues"])
    assert DEFINITIONS.keys() == {"vhosts", "queues", "policies"}
    for script in (WORKER, NEW_TASK):
        assert "queue_declare" not in (ROOT / script).read_text()


# --- Mistakes at the start ---


@pytest.mark.parametrize("command", [[WORKER], [NEW_TASK, "report"]], ids=lambda words: words[0])
def test_the_address_may_come_from_a_file(
    scripts: Scripts, tmp_path: Path, command: list[str]
) -> None:
    """So that it is not in the environment. A wrong password, a malformed address, a missing file:
    one line, exit status 1, and never the password."""
    file = tmp_path / "url"
    nowhere = replaced(scripts.amqp_url, port=free_port())
    with scripts.environment(AMQP_URL_FILE=str(file)):
        for content, cause in (
            ("", "No such file"),
            (replaced(scripts.amqp_url, user=f"guest:{SECRET}"), "ACCESS_REFUSED"),
            (f"amqp://guest:{SECRET}@localhost:70000/", "AMQP_URL must look like"),
        ):
            if content:
                file.write_text(content)
            [line] = scripts.run(*command, status=1).err.seen
            assert cause in line
            assert SECRET not in line
        file.write_text(f"{scripts.amqp_url}\n")
        started = scripts.start(*command, amqp_url=nowhere)
        if command == [WORKER]:
            started.expect_error(event("waiting for tasks"))
        else:
            assert started.wait() == 0


def test_a_port_that_is_taken_is_one_line(scripts: Scripts) -> None:
    """The worker does not go on without its health."""
    port = str(free_port())
    worker(scripts, "--port", port)
    [line] = scripts.run(WORKER, "--port", port, status=1).err.seen
    assert "Address already in use" in line
    for wrong in ("--grace=0", "--prefetch=0", "--port=70000", "more"):
        assert usage_error(scripts.start(WORKER, wrong)).startswith("worker.py: error: ")
