"""RPC: a call that crosses the broker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.spec import Basic, BasicProperties

from tests.proxy import ACK, Proxy
from tests.scripts import Script, Scripts
from tools import ROOT, environment
from tools.broker import Broker, eventually, virtual_host_of

AWAITING = " [x] Awaiting RPC requests"
Request = tuple[Basic.Deliver, BasicProperties, bytes]


def server(scripts: Scripts, amqp_url: str | None = None) -> Script:
    """Start a server and wait until it awaits requests."""
    started = scripts.start("rpc/rpc_server.py", amqp_url=amqp_url)
    started.expect(AWAITING)
    return started


def printed_by(server: Script) -> list[str]:
    """Stop a server, and return all that it has printed."""
    server.stop()
    return server.out.seen


def take(channel: BlockingChannel, number: int) -> list[Request]:
    """Be a server: take this many requests from the queue."""
    channel.queue_declare("rpc_queue", durable=True)
    requests: list[Request] = []
    for method, properties, body in channel.consume("rpc_queue", inactivity_timeout=15):
        assert method and properties and body is not None, f"{len(requests)} of {number} came"  # noqa: PT018
        requests.append((method, properties, body))
        if len(requests) == number:
            break
    channel.cancel()
    return requests


def program(scripts: Scripts, *lines: str, amqp_url: str | None = None) -> Script:
    """Start a program that uses the client as a class."""
    source = "\n".join(["from rpc_client import FibonacciRpcClient, RpcError", *lines])
    env = environment(amqp_url or scripts.amqp_url, PYTHONPATH=str(ROOT / "rpc"))
    started = Script([sys.executable, "-c", source], env)
    scripts.started.append(started)
    return started


def reply(channel: BlockingChannel, request: Request, answer: str, **other: str) -> None:
    """Be a server: answer a request, perhaps with another correlation id."""
    properties = {"correlation_id": request[1].correlation_id, "type": "result"} | other
    channel.basic_publish(
        "", request[1].reply_to, answer.encode(), pika.BasicProperties(**properties)
    )


class Caller:
    """A client of the test's own, which may send what the shipped one would not."""

    def __init__(self, channel: BlockingChannel) -> None:
        self.channel = channel
        self.queue = channel.queue_declare("", exclusive=True).method.queue

    def request(self, body: bytes, **properties: object) -> str:
        """Send a request, and return its correlation id."""
        correlation_id = str(uuid.uuid4())
        settings = {"reply_to": self.queue, "correlation_id": correlation_id} | properties
        self.channel.basic_publish("", "rpc_queue", body, pika.BasicProperties(**settings))
        return correlation_id

    def answers(self, number: int) -> list[tuple[BasicProperties, bytes]]:
        """Wait for this many answers."""
        found: list[tuple[BasicProperties, bytes]] = []
        for _, properties, body in self.channel.consume(self.queue, True, inactivity_timeout=30):
            assert properties and body is not None, f"{len(found)} of {number} came"  # noqa: PT018
            found.append((properties, body))
            if len(found) == number:
                break
        self.channel.cancel()
        return found


@pytest.mark.parametrize(("n", "result"), [(0, 0), (1, 1), (4, 3), (30, 832040)])
def test_a_call_returns_the_answer(scripts: Scripts, n: int, result: int) -> None:
    """The client asks, blocks, and prints the answer."""
    serving = server(scripts)
    client = scripts.run("rpc/rpc_client.py", str(n))
    assert client.out.all() == [f" [x] Requesting fib({n})", f" [.] Got {result}"]
    assert client.err.all() == []
    assert printed_by(serving) == [AWAITING, f" [.] fib({n})"]


def test_without_a_number_it_asks_for_the_thirtieth(scripts: Scripts) -> None:
    """The number is 30 if none is given."""
    server(scripts)
    client = scripts.run("rpc/rpc_client.py")
    assert client.out.all() == [" [x] Requesting fib(30)", " [.] Got 832040"]


def test_a_call_blocks_until_the_answer_is_here(scripts: Scripts, channel: BlockingChannel) -> None:
    """As long as the server is silent, the client waits and prints nothing more."""
    channel.queue_declare("rpc_queue", durable=True)
    client = scripts.start("rpc/rpc_client.py", "7")
    (request,) = take(channel, 1)
    with pytest.raises(subprocess.TimeoutExpired):
        client.process.wait(0.5)
    assert client.out.seen == [" [x] Requesting fib(7)"]
    reply(channel, request, "13")
    assert client.wait() == 0
    assert client.out.seen[-1] == " [.] Got 13"


def test_the_client_is_a_class_for_programs_of_ones_own(scripts: Scripts) -> None:
    """FibonacciRpcClient is imported, opened once, and called again and again."""
    server(scripts)
    ended = program(
        scripts,
        "with FibonacciRpcClient() as client:",
        "    print(client.call(10), client.call(11, timeout=5), client.call_many([3, 2, 1]))",
        "    try:",
        "        client.call(-1)",
        "    except RpcError as error:",
        "        print(error)",
        "    print(client.call_many([]), client.call(12))",
        "    for timeout in (0, -1, float('nan'), float('inf'), 5_000_000):",
        "        try:",
        "            client.call(1, timeout=timeout)",
        "        except ValueError as error:",
        "            print('ValueError')",
    )
    assert ended.wait() == 0, str(ended)
    expected = ["55 89 [2, 1, 1]", "fib(-1): not a whole number from 0 to 40", "[] 144"]
    assert ended.out.seen == expected + ["ValueError"] * 5
    assert ended.err.seen == []


def test_a_client_has_one_callback_queue_for_all_its_calls(
    broker: Broker, scripts: Scripts, channel: BlockingChannel
) -> None:
    """It is exclusive, the broker names it, and it is gone when the client is."""
    channel.queue_declare("rpc_queue", durable=True)
    client = program(
        scripts,
        "with FibonacciRpcClient() as client:",
        "    print(client.call(1), client.call(2), client.call_many([3, 4]))",
    )
    requests = take(channel, 1)
    for number in (1, 2):
        reply(channel, requests[-1], "1")
        requests += take(channel, number)
    callback_queues = {properties.reply_to for _, properties, _ in requests}
    assert len(callback_queues) == 1
    path = f"queues/{virtual_host_of(scripts.amqp_url)}"
    (queue,) = [q for q in broker.api("GET", path) if q["name"] != "rpc_queue"]
    assert {queue["name"]} == callback_queues
    assert queue["exclusive"] is True
    assert queue["name"].startswith("amq.gen-")
    for request in requests[2:]:
        reply(channel, request, "1")
    assert client.wait() == 0
    assert client.out.seen == ["1 1 [1, 1]"]
    eventually(lambda: [q["name"] for q in broker.api("GET", path)] == ["rpc_queue"], "it is gone")


def test_answers_in_another_order_go_to_their_requests(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """Each request has its own correlation id; the client prints in the order it asked."""
    channel.queue_declare("rpc_queue", durable=True)
    client = scripts.start("rpc/rpc_client.py", "7", "6", "5")
    requests = take(channel, 3)
    assert [body for _, _, body in requests] == [b"7", b"6", b"5"]
    assert len({properties.correlation_id for _, properties, _ in requests}) == 3
    for request, answer in zip(reversed(requests), ("5", "8", "13"), strict=True):
        reply(channel, request, answer)
    assert client.wait() == 0
    assert client.out.seen[3:] == [" [.] Got 13", " [.] Got 8", " [.] Got 5"]


def test_two_servers_answer_in_another_order(scripts: Scripts) -> None:
    """The server that is free answers what is quick, and each answer finds its request."""
    servers = [server(scripts) for _ in range(2)]
    client = scripts.run("rpc/rpc_client.py", "35", "5", "12")
    assert client.out.all()[3:] == [" [.] Got 9227465", " [.] Got 5", " [.] Got 144"]
    computed = sorted(printed_by(each)[1:] for each in servers)
    assert computed == [[" [.] fib(35)"], [" [.] fib(5)", " [.] fib(12)"]]


def test_an_answer_nobody_asked_for_is_ignored(scripts: Scripts, channel: BlockingChannel) -> None:
    """An unknown correlation id, none at all, bytes that are no text: the client waits on."""
    channel.queue_declare("rpc_queue", durable=True)
    client = scripts.start("rpc/rpc_client.py", "7", "8")
    first, second = take(channel, 2)
    reply(channel, first, "666", correlation_id="unknown")
    reply(channel, first, "666", correlation_id=b"\xff")  # type: ignore[arg-type]
    channel.basic_publish("", first[1].reply_to, b"666")
    reply(channel, first, "666", correlation_id="unknown", type="error")
    reply(channel, first, "13")
    reply(channel, first, "666")  # a second answer
    reply(channel, second, "21")
    assert client.wait() == 0
    assert client.out.seen[2:] == [" [.] Got 13", " [.] Got 21"]
    assert client.err.seen == []


NONSENSE = [
    "thirteen",
    "",
    "-13",
    "1.5",
    " 13",
    "9" * 5000,
    "\uff11\uff13",
]  # the last: fullwidth 13


def test_an_answer_that_is_no_number_is_an_error(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """An answer that is no number of a sane size is never taken for one: one line that shows the
    beginning of it, exit status 1."""
    channel.queue_declare("rpc_queue", durable=True)
    for nonsense in NONSENSE:
        client = scripts.start("rpc/rpc_client.py", "7")
        (request,) = take(channel, 1)
        reply(channel, request, nonsense)
        assert client.wait() == 1
        (line,) = client.err.seen
        assert line.startswith(" [!] fib(7): ")
        assert len(line) < 500
        assert client.out.seen == [" [x] Requesting fib(7)"]


@contextmanager
def dying_server(scripts: Scripts) -> Iterator[Script]:
    """Start a server that is killed between its first answer and the acknowledgement."""

    def watch(index: int, to_broker: bool) -> bool:
        if to_broker and index == ACK:
            dying.process.kill()
            return False
        return True

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        dying = server(scripts, amqp_url=proxy.url)
        yield dying


def test_a_server_killed_before_it_acknowledged_answers_twice(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """The request is still in the queue, so another server computes it again and answers, too."""
    with dying_server(scripts) as dying:
        caller = Caller(channel)
        correlation_id = caller.request(b"10")
        assert dying.wait() == -9
        server(scripts)
        answers = caller.answers(2)
    assert [(p.correlation_id, body) for p, body in answers] == [(correlation_id, b"55")] * 2


def test_the_client_takes_the_first_of_two_answers(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """A request that two servers answered has one answer for the client, and so have the others."""
    with dying_server(scripts) as dying:
        client = scripts.start("rpc/rpc_client.py", "--timeout", "60", "20", "21", "22")
        assert dying.wait() == -9
        assert dying.out.seen == [AWAITING, " [.] fib(20)"]
        other = server(scripts)
        assert client.wait() == 0
    assert client.out.seen[3:] == [" [.] Got 6765", " [.] Got 10946", " [.] Got 17711"]
    assert channel.queue_declare("rpc_queue", passive=True).method.message_count == 0
    assert sorted(printed_by(other)[1:]) == [" [.] fib(20)", " [.] fib(21)", " [.] fib(22)"]


def test_a_server_killed_while_it_computes_is_replaced(scripts: Scripts) -> None:
    """Another server answers, and the client notices nothing."""
    dying = server(scripts)
    client = scripts.start("rpc/rpc_client.py", "--timeout", "60", "35")
    dying.expect(" [.] fib(35)")
    dying.kill()
    other = server(scripts)
    assert client.wait(60) == 0
    assert client.out.seen == [" [x] Requesting fib(35)", " [.] Got 9227465"]
    assert client.err.seen == []
    assert printed_by(other) == [AWAITING, " [.] fib(35)"]


def seconds_of(scripts: Scripts, call: str) -> tuple[float, float]:
    """Return after how many seconds a call raises its timeout, and how many it takes to leave."""
    ended = program(
        scripts,
        "import time",
        "with FibonacciRpcClient() as client:",
        "    begin = time.monotonic()",
        "    try:",
        f"        {call}",
        "    except TimeoutError:",
        "        end = time.monotonic()",
        "print(end - begin)",
        "print(time.monotonic() - end)",
    )
    assert ended.wait() == 0, str(ended)
    call_took, leaving_took = map(float, ended.out.seen)
    return call_took, leaving_took


CALLS = ["client.call(30, timeout=1.5)", "client.call_many([5] * 50_000, timeout=1.5)"]


@pytest.mark.parametrize("call", CALLS, ids=["one", "50,000"])
def test_a_call_ends_in_the_time_given_also_where_the_broker_takes_nothing(
    own_broker: Broker, scripts: Scripts, channel: BlockingChannel, call: str
) -> None:
    """A broker that is short of memory reads nothing from those who publish. A call ends in its
    time also while it sends, and to leave the `with` block takes a second at most."""
    channel.queue_declare("rpc_queue", durable=True)
    own_broker.rabbitmqctl("set_vm_memory_high_watermark", "0.000001")
    try:
        alarms = "rabbit_alarm:get_alarms()."
        eventually(lambda: "memory" in own_broker.rabbitmqctl("eval", alarms), "it is short of it")
        call_took, leaving_took = seconds_of(scripts, call)
        assert 1.5 <= call_took < 2.5
        assert leaving_took < 2
    finally:
        own_broker.rabbitmqctl("set_vm_memory_high_watermark", "0.6")


def test_without_a_server_a_call_ends_in_the_time_given(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """The client raises a timeout; a server that starts later does not compute the request."""
    channel.queue_declare("rpc_queue", durable=True)
    client = scripts.run("rpc/rpc_client.py", "--timeout", "0.5", "30", "29", status=1)
    assert client.err.seen == [" [!] No answer within 0.5 s"]
    for call in CALLS:
        call_took, leaving_took = seconds_of(scripts, call)
        assert 1.5 <= call_took < 2.5
        assert leaving_took < 1

    late = server(scripts)
    scripts.run("rpc/rpc_client.py", "5")
    assert printed_by(late) == [AWAITING, " [.] fib(5)"]


def test_leaving_a_client_whose_connection_is_lost_raises_nothing(scripts: Scripts) -> None:
    """A program that has dealt with the lost connection goes on."""
    server(scripts)
    with closing(Proxy(scripts.amqp_url)) as proxy:
        left = program(
            scripts,
            "import pika, sys",
            "with FibonacciRpcClient() as client:",
            "    print(client.call(10), flush=True)",
            "    try:",
            "        while True:",
            "            client.call(10)",
            "    except pika.exceptions.AMQPError:",
            "        print('lost', flush=True)",
            "print('left')",
            amqp_url=proxy.url,
        )
        left.expect("55")
        proxy.cut()
        assert left.wait() == 0
    assert left.out.seen == ["55", "lost", "left"]
    assert left.err.seen == []


def test_few_requests_are_in_flight(scripts: Scripts, channel: BlockingChannel) -> None:
    """A client with many numbers sends the next request when an answer is here: no more than 100
    of its requests wait at a time, and all of them are answered."""
    channel.queue_declare("rpc_queue", durable=True)
    client = program(
        scripts,
        "with FibonacciRpcClient() as client:",
        "    print(sum(client.call_many([5] * 300, timeout=60)))",
    )
    requests = take(channel, 100)
    assert channel.queue_declare("rpc_queue", passive=True).method.message_count == 0
    for request in requests[:1]:
        reply(channel, request, "5")
    requests += take(channel, 1)
    assert channel.queue_declare("rpc_queue", passive=True).method.message_count == 0
    while len(requests) < 300:
        for request in requests[-100:]:
            reply(channel, request, "5")
        requests += take(channel, min(100, 300 - len(requests)))
    for request in requests[-100:]:
        reply(channel, request, "5")
    assert client.wait() == 0, str(client)
    assert client.out.seen == ["1500"]


def test_where_no_server_has_ever_run_the_client_says_so_at_once(scripts: Scripts) -> None:
    """There is no queue for the requests: they are returned, and nobody waits for an answer."""
    client = scripts.run("rpc/rpc_client.py", "--timeout", "60", "30", "5", status=1)
    assert client.out.all() == [" [x] Requesting fib(30)", " [x] Requesting fib(5)"]
    assert client.err.all() == [" [!] fib(30): there is no queue 'rpc_queue': start a server"]


BAD_INPUT = {
    "text": b"ten",
    "negative": b"-1",
    "too large": b"41",
    "far too large": b"9" * 10_000,
    "a fraction": b"1.5",
    "nothing": b"",
    "no text": b"\xff\xfe",
    "two numbers": b"1 2",
}


def test_bad_input_comes_back_as_an_error(scripts: Scripts, channel: BlockingChannel) -> None:
    """The caller gets an error, the server serves on."""
    serving = server(scripts)
    caller = Caller(channel)
    for name, body in BAD_INPUT.items():
        correlation_id = caller.request(body)
        ((properties, answer),) = caller.answers(1)
        assert properties.correlation_id == correlation_id, name
        assert properties.type == "error", name
        assert properties.content_type == "text/plain", name
        assert answer == b"not a whole number from 0 to 40", name
    caller.request(b"10")
    ((properties, answer),) = caller.answers(1)
    assert (properties.type, properties.content_type, answer) == ("result", "text/plain", b"55")
    assert printed_by(serving) == [AWAITING, " [.] fib(10)"]
    assert serving.err.seen == []


@pytest.mark.parametrize("n", ["-1", "41"])
def test_the_client_shows_the_error_of_the_server(scripts: Scripts, n: str) -> None:
    """One line on standard error, and exit status 1."""
    server(scripts)
    client = scripts.run("rpc/rpc_client.py", n, status=1)
    assert client.err.all() == [f" [!] fib({n}): not a whole number from 0 to 40"]


def test_a_request_with_no_address_is_dropped(scripts: Scripts, channel: BlockingChannel) -> None:
    """Nobody waits for its answer: it is not computed, and the server serves on."""
    serving = server(scripts)
    channel.basic_publish("", "rpc_queue", b"30")
    channel.basic_publish("", "rpc_queue", b"no number")
    scripts.run("rpc/rpc_client.py", "6")
    assert channel.queue_declare("rpc_queue", passive=True).method.message_count == 0
    assert printed_by(serving) == [AWAITING, " [.] fib(6)"]


SCHEDSTAT = "/proc/{}/schedstat"  # Linux: nanoseconds on a core, nanoseconds in line for one


def seconds_on_a_core_and_in_line(servers: list[Script]) -> tuple[float, float]:
    """Return how long processes have run, and how long they could not for the cores were busy."""
    read = [Path(SCHEDSTAT.format(each.process.pid)).read_text().split() for each in servers]
    return sum(int(run) for run, _, _ in read) / 1e9, sum(int(line) for _, line, _ in read) / 1e9


def servers_at_work(scripts: Scripts, servers: list[Script]) -> float:
    """Return how many servers work at a time while 16 calls are in flight.

    It is the time that they compute, over the time on the clock, less what they stood in line for
    a core. A call costs the same whoever answers it, so this is the calls in the same time, too,
    but does not depend on what else runs on the machine, or on how fast it is just now.
    """
    begin = seconds_on_a_core_and_in_line(servers)
    client = scripts.run("rpc/rpc_client.py", "--timeout", "100", *["31"] * 16)
    end = seconds_on_a_core_and_in_line(servers)
    assert client.out.seen.count(" [.] Got 1346269") == 16
    elapsed = client.out.times[-1] - client.out.time_of(" [x] Requesting fib(31)")
    computed, in_line = (after - before for before, after in zip(begin, end, strict=True))
    return computed / (elapsed - in_line / len(servers))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.skipif(not Path(SCHEDSTAT.format("self")).exists(), reason="needs Linux's statistics")
def test_servers_share_the_load(
    scripts: Scripts, record_property: Callable[[str, object], None]
) -> None:
    """Two servers compute at the same time, and so do at least 1.6 times the work of one."""
    servers = [server(scripts)]
    assert len(os.sched_getaffinity(servers[0].process.pid)) >= 2, "it may use two cores"
    alone = servers_at_work(scripts, servers)
    servers.append(server(scripts))
    together = servers_at_work(scripts, servers)
    record_property("two servers", f"{together / alone:.2f} times the calls of one")
    assert together / alone >= 1.6, (alone, together)
    done = [printed_by(each).count(" [.] fib(31)") for each in servers]
    assert sum(done) == 32, "none is done twice"


def test_a_client_says_that_its_connection_is_lost(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """A client that waits for an answer ends with one line, instead of hanging."""
    channel.queue_declare("rpc_queue", durable=True)
    with closing(Proxy(scripts.amqp_url)) as proxy:
        client = scripts.start("rpc/rpc_client.py", "--timeout", "60", amqp_url=proxy.url)
        take(channel, 1)
        proxy.close()
        assert client.wait() == 1
    (line,) = client.err.seen
    assert re.fullmatch(r" \[!\] .*(lost|EOF|closed).*", line)
