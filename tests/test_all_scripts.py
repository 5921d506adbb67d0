"""What all scripts promise."""

from __future__ import annotations

import ast
import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pika
import pytest
import trustme
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ConnectionClosedByBroker

from tests.proxy import Proxy
from tests.scripts import (
    CONSUMERS,
    EMIT_DIRECT,
    EMIT_LOG,
    EMIT_TOPIC,
    FILE_WORKER,
    LOST,
    MALFORMED,
    NEEDED,
    NEW_FILE,
    NEW_TASK,
    NEW_TASKS,
    NO_BROKER,
    PARKED,
    PRODUCERS,
    RECEIVE,
    RECEIVE_DIRECT,
    RECEIVE_LOGS,
    RECEIVE_TOPIC,
    RPC_CLIENT,
    RPC_SERVER,
    SCRIPTS,
    SECRET,
    SEND,
    SHAPES,
    WORKER,
    Scripts,
    another_user,
    consumer,
    expect_waiting,
    one_line,
    received,
    replaced,
)
from tools import ROOT, environment
from tools.broker import Broker, Container, free_port, virtual_host_of

# --- Errors: one line, no traceback, no password ---


def test_a_producer_that_finds_no_rabbitmq_ends_with_an_error_of_one_line(scripts: Scripts) -> None:
    """It ends at once, and the line says which address refused it."""
    nobody = replaced(scripts.amqp_url, user=f"guest:{SECRET}", port=free_port())
    for started in scripts.launch(*PRODUCERS, amqp_url=nobody).values():
        assert re.fullmatch(rf"{re.escape(NO_BROKER)}127.0.0.1:\d+: .*refused", one_line(started))


def test_an_error_names_each_address_and_what_came_back(scripts: Scripts) -> None:
    """Nobody listens at the first, the second does not know the password, and the third does not
    know the virtual host. Each is asked, even after one that has refused us."""
    unknown = replaced(scripts.amqp_url, user=f"guest:{quote(SECRET)}")
    urls = f"amqp://localhost:1,{unknown},{replaced(scripts.amqp_url, path='/nowhere')}"
    place = re.escape(unknown.rpartition("@")[2].partition("/")[0])
    told = re.compile(
        re.escape(NO_BROKER) + r"localhost:1: \[Errno \d+\] Connection refused; "
        rf"{place}: [^;]*ACCESS_REFUSED - Login was refused[^;]*; "
        rf"{place}: [^;]*NOT_ALLOWED - vhost nowhere not found[^;]*"
    )
    for started in scripts.launch(*SHAPES, amqp_url=urls).values():
        assert told.fullmatch(one_line(started))


def test_a_wrong_password_or_virtual_host_ends_each_script(scripts: Scripts) -> None:
    """A consumer does not try again either, also if the virtual host has a name like a word from
    an error that passes."""
    for wrong, told in (
        (replaced(scripts.amqp_url, user=f"guest:{SECRET}"), "ACCESS_REFUSED - Login was refused"),
        (replaced(scripts.amqp_url, path="/unlimited"), "NOT_ALLOWED - vhost unlimited not found"),
    ):
        for started in scripts.launch(*SHAPES, NEW_TASKS, amqp_url=wrong).values():
            assert told in one_line(started)


WRONG = [  # settings that are missing, unknown, or read in another way than they were meant
    "",
    "amqp://guest:guest@localhost:1/,",
    ",amqp://guest:guest@localhost:1/",
    f"amqp://guest:{SECRET}@",
    f"http://guest:{SECRET}@localhost:1/",
    f"guest:{SECRET}@localhost:1",
    f"amqp://guest:{SECRET}#@localhost:1/",
    f"amqp://guest:{SECRET}?@localhost:1/",
    f"amqp://guest:{SECRET}/x@localhost:1/",
    f"amqp://guest:{SECRET},x@localhost:1/",
    f"amqp://guest:{SECRET}\udce9@localhost:1/",  # a byte that is not UTF-8
    "amqp://localhost:70000/",
    f"amqp://guest:{SECRET}@localhost:1/?{SECRET}=1",
    f"amqp://guest:{SECRET}@[::1",
    f"amqp://localhost:1/?ssl_options={{{SECRET}",
]


def test_a_wrong_amqp_url_ends_each_script_with_an_error_of_one_line(scripts: Scripts) -> None:
    """No other address is tried instead. The line says what a URL looks like, and does not show the
    wrong one, which may contain a password. A consumer does not try again."""
    wrong = [scripts.start(name, amqp_url=url) for name in (SEND, NEW_TASKS) for url in WRONG]
    for started in [*wrong, *scripts.launch(*SHAPES, amqp_url="").values()]:
        assert one_line(started) == MALFORMED


def test_without_a_url_the_broker_is_on_this_computer() -> None:
    """Only a variable that is not set stands for localhost:5672."""
    show = "import pika, send; pika.BlockingConnection = print; send.connect()"
    shown = subprocess.check_output(
        [sys.executable, "-c", show], env=environment(PYTHONPATH=f"{ROOT}/hello_world"), text=True
    )
    assert "host=localhost port=5672 virtual_host=/ " in shown


def test_an_error_names_its_cause(scripts: Scripts, own_broker: Broker, amqp_url: str) -> None:
    """A wrong scheme, virtual host or file looks different from a RabbitMQ that does not run."""
    url = replaced(amqp_url, user=f"guest:{SECRET}")
    virtual_host = virtual_host_of(amqp_url)
    stop = f'rabbit_vhost_sup_sup:stop_and_delete_vhost(<<"{virtual_host}">>).'
    own_broker.rabbitmqctl("eval", stop)
    files = quote(str({"ca_certs": "/no/such/file"}))
    told = {
        url.replace("amqp:", "amqps:"): "SSL",
        amqp_url: f"vhost '{virtual_host}' is down",
        f"{url}?ssl_options={files}".replace("amqp:", "amqps:"): "No such file or directory",
    }
    for started, reason in [(scripts.start(SEND, amqp_url=at), told[at]) for at in told]:
        assert reason in one_line(started)


def test_an_importing_program_gets_an_exception() -> None:
    """FibonacciRpcClient() with a wrong URL ends no program that imports it, and changes neither
    its signals nor its output."""
    program = """if True:
        import signal, sys
        from pika.exceptions import AMQPError
        before = [signal.getsignal(n) for n in (2, 15)], sys.stdout
        from rpc_client import FibonacciRpcClient
        try:
            FibonacciRpcClient()
        except AMQPError as error:
            print(error)
        print(before == ([signal.getsignal(n) for n in (2, 15)], sys.stdout))
    """
    shown = subprocess.check_output(
        [sys.executable, "-c", program],
        env=environment(WRONG[3], PYTHONPATH=f"{ROOT}/rpc"),
        text=True,
    )
    assert shown == f"{MALFORMED.removeprefix(' [!] ')}\nTrue\n"


# --- A node that is full ---


def waits_for_room(scripts: Scripts, full: str, make_room: Callable[[], object]) -> None:
    """Producers say that a broker is full; consumers that start say so, too, wait, and consume as
    soon as there is room."""
    for started in scripts.launch(SEND, NEW_TASK, amqp_url=full).values():
        assert re.search(r"NOT_ALLOWED - .* limit \(0\) is reached", one_line(started))
    waiting = scripts.launch(RECEIVE, WORKER, amqp_url=full).values()
    for started in waiting:
        started.expect_error(LOST)
    make_room()
    for started in waiting:
        expect_waiting(started)
        assert len(started.err.seen) == 1


@pytest.mark.parametrize("limits", ["vhost-limits", "user-limits"])
def test_a_limit_of_connections_is_no_reason_to_give_up(
    broker: Broker, scripts: Scripts, amqp_url: str, limits: str
) -> None:
    """If a virtual host or a user has all the connections that it may have, a script tries the next
    address, and a consumer waits."""
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    with (
        another_user(broker, amqp_url, "many", **everything) as full,
        broker.virtual_host(f"free-{os.getpid()}") as free,
    ):
        whose = "many" if limits == "user-limits" else virtual_host_of(amqp_url)
        limit = f"{limits}/{whose}/max-connections"
        broker.api("PUT", limit, {"value": 0})
        scripts.run(SEND, "to the second", amqp_url=f"{full},{free}")
        consumer(scripts, RECEIVE, amqp_url=f"{full},{free}").expect(received("to the second"))
        waits_for_room(scripts, full, partial(broker.api, "DELETE", limit))


def test_a_consumer_waits_if_a_virtual_host_is_full_of_queues(
    broker: Broker, scripts: Scripts, amqp_url: str
) -> None:
    """A consumer whose queue is one too many waits until there is room."""
    path = f"vhost-limits/{virtual_host_of(amqp_url)}/max-queues"
    broker.api("PUT", path, {"value": 0})
    waiting = scripts.launch(RECEIVE, RECEIVE_LOGS)
    for started in waiting.values():
        started.expect_error(LOST)
    broker.api("DELETE", path)
    for started in waiting.values():
        expect_waiting(started)


def test_a_consumer_waits_if_a_node_is_full(own_broker: Broker, scripts: Scripts) -> None:
    """A consumer that finds all connections of a node taken (connection_max) waits for one."""
    if own_broker.version.startswith("3."):
        pytest.skip(f"RabbitMQ {own_broker.version} has no such limit")

    def allow(connections: str) -> None:
        setting = f"application:set_env(rabbit, connection_max, {connections})."
        own_broker.rabbitmqctl("eval", setting)

    allow("0")
    try:
        waits_for_room(scripts, scripts.amqp_url, partial(allow, "infinity"))
    finally:
        allow("infinity")


# --- What the broker refuses ---


def test_a_queue_with_other_settings_is_an_error_of_one_line(
    scripts: Scripts, channel: BlockingChannel
) -> None:
    """A script says so if a queue or an exchange already exists with other settings than its own,
    and ends."""
    for queue in ("hello", "task_queue", "rpc_queue"):
        channel.queue_declare(queue, durable=True, arguments={"x-max-length": 5})
    channel.exchange_declare("logs", "headers", durable=True)
    channel.queue_declare("tasks", durable=True)
    declaring = [name for name in (*SHAPES, NEW_TASKS, FILE_WORKER) if name != RPC_CLIENT]
    for started in scripts.launch(*declaring).values():
        assert "PRECONDITION_FAILED - inequivalent arg" in one_line(started)


def test_a_missing_permission_is_an_error_of_one_line(broker: Broker, scripts: Scripts) -> None:
    """The line says which user has no access to which queue or exchange."""
    with another_user(broker, scripts.amqp_url, "newcomer") as url:
        for started in scripts.launch(*SHAPES, NEW_TASKS, FILE_WORKER, amqp_url=url).values():
            line = one_line(started)
            assert "ACCESS_REFUSED - " in line
            assert "'newcomer'" in line


def test_a_message_that_is_refused_is_not_reported_as_sent(
    broker: Broker, scripts: Scripts
) -> None:
    """The user may declare and read, but not write: each producer ends with an error."""
    reader = {"configure": ".*", "write": r"^(?!amq\.default$|.*logs$).*", "read": ".*"}
    scripts.run(SEND)
    serving = consumer(scripts, RPC_SERVER)
    with another_user(broker, scripts.amqp_url, "reader", **reader) as url:
        refused = scripts.launch(
            SEND, NEW_TASK, EMIT_LOG, EMIT_DIRECT, EMIT_TOPIC, RPC_CLIENT, amqp_url=url
        )
        client = refused.pop(RPC_CLIENT)
        for started in refused.values():
            assert re.search("ACCESS_REFUSED - .*(amq.default|logs)", one_line(started))
            assert started.out.seen == []
        told = re.compile(r" \[!\] .*ACCESS_REFUSED - .*access to exchange .amq.default.*")
        assert told.fullmatch(one_line(client))
    assert serving.out.seen == [CONSUMERS[RPC_SERVER]]


def test_a_rabbitmq_that_never_answers_is_an_error_of_one_line(scripts: Scripts) -> None:
    """If a host accepts the connection and then says nothing, a script gives up after pika's
    timeout. A consumer tries again."""
    silence = rf"{re.escape(NO_BROKER)}127.0.0.2:\d+: .*Timeout.*"
    with closing(Proxy(scripts.amqp_url, lambda *_: False)) as silent:
        running = scripts.launch(*SHAPES, amqp_url=f"{silent.url}?stack_timeout=1")
        for name, started in running.items():
            if name in CONSUMERS:
                started.expect_error(re.compile(f"{silence}; trying again every second"))
            else:
                assert re.fullmatch(silence, one_line(started))


def test_no_script_needs_what_newer_versions_of_rabbitmq_refuse(
    broker: Broker, channel: BlockingChannel
) -> None:
    """All tests run on a RabbitMQ that refuses queues that are neither durable nor exclusive, as
    the official image of 4.3 does. (One without containers, or before 4.0, permits them.)"""
    if not isinstance(broker, Container) or broker.version.startswith("3."):
        pytest.skip(f"{broker} permits them")
    with pytest.raises(ConnectionClosedByBroker, match="transient_nonexcl_queues"):
        channel.queue_declare("neither")


# --- AMQP_URL: what pika understands in it ---


def test_an_amqps_url_is_encrypted(scripts: Scripts, tmp_path: Path) -> None:
    """amqps and ssl_options work as pika's URLParameters says. The certificate of a stranger is an
    error of one line."""
    ours, stranger = trustme.CA(), trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.issue_cert("127.0.0.2").configure_cert(tls)
    for name, authority in (("ours", ours), ("stranger", stranger)):
        authority.cert_pem.write_to_path(str(tmp_path / name))

    with closing(Proxy(scripts.amqp_url, tls=tls)) as encrypted:
        url, untrusting = (
            f"{encrypted.url}?ssl_options={quote(str({'ca_certs': str(tmp_path / name)}))}"
            for name in ("ours", "stranger")
        )
        line = one_line(scripts.start(SEND, amqp_url=untrusting))
        assert re.search(r" 127.0.0.2:\d+: .*CERTIFICATE_VERIFY_FAILED", line)
        scripts.run(SEND, amqp_url=url)
        started = scripts.start(RECEIVE, amqp_url=f"amqp://127.0.0.2:1,{url}")
        started.expect(received("Hello World!"))


def test_a_producer_waits_while_rabbitmq_is_short_of_memory_or_gives_up(
    own_broker: Broker, scripts: Scripts
) -> None:
    """RabbitMQ then reads no messages. Without blocked_connection_timeout in the URL a producer
    waits until it does, and with it, only so long."""
    memory = "{resource_limit, memory, node()}"
    own_broker.rabbitmqctl("eval", f"rabbit_alarm:set_alarm({{{memory}, []}}).")
    try:
        patient = scripts.start(SEND)
        url = f"{scripts.amqp_url}?blocked_connection_timeout=1"
        assert "Blocked connection timeout" in one_line(scripts.start(SEND, amqp_url=url))
        assert patient.process.poll() is None
    finally:
        own_broker.rabbitmqctl("eval", f"rabbit_alarm:clear_alarm({memory}).")
    assert patient.wait() == 0


# --- Complete in itself ---


def test_each_script_runs_alone_with_pika_alone(scripts: Scripts, tmp_path: Path) -> None:
    """Copied into an empty folder, with nothing installed but pika, each script does its work."""
    installed = tmp_path / "installed"
    installed.mkdir()
    assert pika.__file__
    (installed / "pika").symlink_to(Path(pika.__file__).parent)
    env = environment(scripts.amqp_url, PYTHONPATH=str(installed))
    running = {}

    def run_alone(name: str) -> None:
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        copy = Path(shutil.copy(ROOT / name, folder))
        # -S leaves out all that is installed beside the standard library
        command = [sys.executable, "-S", copy.name, *NEEDED.get(name, [])]
        running[name] = scripts.start_command(command, env, cwd=folder)

    others = [name for name in SCRIPTS if name not in CONSUMERS]
    for name in CONSUMERS:
        run_alone(name)
    for name in CONSUMERS:
        expect_waiting(running[name])
    for name in others:
        run_alone(name)
    for name in others:
        assert running[name].wait() == 0, str(running[name])
    for name, line in {
        RECEIVE: received("Hello World!"),
        WORKER: received("Hello..."),
        RECEIVE_LOGS: " [x] info: Hello World!",
        RECEIVE_DIRECT: " [x] info:Hello World!",
        RECEIVE_TOPIC: " [x] anonymous.info:Hello World!",
        RPC_CLIENT: " [.] Got 832040",
        NEW_TASKS: " [x] Sent 0 tasks",
        FILE_WORKER: received("README.md"),
    }.items():
        running[name].expect(line)


def parts_of(name: str) -> tuple[str, str, str]:
    """Return what all scripts have to the letter: what stands before the import of pika and after
    the imports of the standard library, `connect` with what follows, and the end."""
    script = (ROOT / name).read_text()
    end = 'if __name__ == "__main__":\n'
    signals = script.partition(f"\n{end}")[2].partition("\nimport pika\n")[0]
    plumbing, _, ending = script.partition("\n# --- From here on, all ")[2].rpartition(end)
    return signals, plumbing, ending


def test_what_all_scripts_do_is_the_same_code_in_each() -> None:
    """All producers are the same before their lesson and after it, and so are all consumers. Both
    connect in the same way, and new_tasks.py treats signals in a way of its own."""
    names = [*PRODUCERS, "streams/emit_log_stream.py"], [*CONSUMERS, "streams/read_logs.py"]
    for first, *others in names:
        assert [name for name in others if parts_of(name) != parts_of(first)] == [], first
    producer_signals, producer, _ = parts_of(SEND)
    consumer_signals, consumer, _ = parts_of(RECEIVE)
    assert "signal.SIG_DFL" in producer_signals
    assert "os._exit(0)" in consumer_signals
    assert "def connect():" in producer
    both = consumer.partition("\n\ndef run(options):")[0]
    assert both.removeprefix("consumers") == producer.removeprefix("producers").rstrip("\n") + "\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_pika_and_the_standard_library_alone(name: str) -> None:
    """Nothing of this project, and nothing else that would have to be installed."""
    imported = re.findall(r"^ *(?:import|from) (\w+)", (ROOT / name).read_text(), re.MULTILINE)
    assert {*imported} - sys.stdlib_module_names == {"pika"}


@pytest.mark.parametrize(
    "name", [name for name in SCRIPTS if name not in (NEW_TASKS, NEW_FILE, PARKED)]
)
def test_a_script_begins_with_what_its_lesson_teaches(name: str) -> None:
    """It declares its queue or exchange within 29 lines, or 48 in the longest scripts."""
    lines = (ROOT / name).read_text().splitlines()
    first = next(i for i, line in enumerate(lines, 1) if re.search(r"channel\.\w+_declare\(", line))
    assert first <= (48 if name in (RPC_CLIENT, FILE_WORKER) else 29)


# --- Help and usage ---


def test_help_says_what_a_script_is_for(scripts: Scripts) -> None:
    """--help needs no broker; it shows the usage and what the script does."""
    for shown in [scripts.start(name, "--help", amqp_url="amqp://localhost:1") for name in SCRIPTS]:
        assert shown.wait() == 0
        assert shown.out.seen[0].startswith(f"usage: {shown.path.name} ")
        purpose = ast.get_docstring(ast.parse(shown.path.read_text()))
        assert purpose
        assert purpose in " ".join(" ".join(shown.out.seen).split())
        assert shown.err.seen == []


REFUSED: dict[tuple[str, ...], str] = {  # calls, and what the error says
    **{(n, *NEEDED.get(n, []), "--unknown"): "unrecognized arguments: --unknown" for n in SCRIPTS},
    **{(n, "extra"): "unrecognized arguments: extra" for n in CONSUMERS if n not in NEEDED},
    (PARKED, "extra"): "unrecognized arguments: extra",
    **{(name,): "the following arguments are required" for name in NEEDED},
    **{(NEW_TASKS, f"--window={n}"): "the window must be at least 1" for n in (0, -1)},
    (NEW_TASKS, "--window=many"): "argument --window: invalid",
    **{(WORKER, f"--prefetch={n}"): "must be from 0 to 65535" for n in (-1, 65536)},
    (WORKER, "--prefetch=many"): "argument --prefetch: invalid",
    **{(FILE_WORKER, f"--tries={n}"): "must be from 1 to 100" for n in (0, 101)},
    (RPC_CLIENT, "ten"): "invalid int value: 'ten'",
    (RPC_CLIENT, "--timeout=soon"): "argument --timeout: invalid",
    **{(RPC_CLIENT, f"--timeout={n}"): "timeout must be" for n in (0, -1, "nan", "inf")},
}


def test_what_a_script_does_not_know_is_refused(scripts: Scripts) -> None:
    """A usage line on standard error and exit status 2; it needs no broker."""
    nobody = "amqp://localhost:1"
    for refused, told in [(scripts.start(*c, amqp_url=nobody), REFUSED[c]) for c in REFUSED]:
        assert refused.wait() == 2
        assert refused.out.seen == []
        *usage, error = refused.err.seen
        assert usage[0].startswith(f"usage: {refused.path.name} ")
        assert all(line.startswith(" ") for line in usage[1:])
        assert error.startswith(f"{refused.path.name}: error: ")
        assert told in error
