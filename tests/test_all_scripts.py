"""What all eight scripts promise."""

from __future__ import annotations

import ast
import re
import shutil
import signal
import ssl
import subprocess
import sys
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote, urlsplit

import pika
import pytest
import trustme
from pika.adapters.blocking_connection import BlockingChannel

from tests.proxy import ACK, Proxy
from tests.scripts import Script, Scripts
from tools import ROOT, environment
from tools.broker import Broker, eventually, free_port, virtual_host_of

ONE_SHOT = [
    "hello_world/send.py",
    "work_queues/new_task.py",
    "publish_subscribe/emit_log.py",
    "rpc/rpc_client.py",
]
CONSUMERS = {  # and what each of them prints when it consumes
    "hello_world/receive.py": " [*] Waiting for messages. To exit press CTRL+C",
    "work_queues/worker.py": " [*] Waiting for tasks. To exit press CTRL+C",
    "publish_subscribe/receive_logs.py": " [*] Waiting for logs. To exit press CTRL+C",
    "rpc/rpc_server.py": " [x] Awaiting RPC requests",
}
SCRIPTS = [*ONE_SHOT, *CONSUMERS]
SECRET = "s3cr3t-pässword"
STOPS = [signal.SIGINT, signal.SIGTERM]


def expect_waiting(script: Script, name: str, count: int = 1) -> None:
    """Wait until a consumer says that it consumes; receive_logs.py says so on standard error."""
    expect = script.expect_error if name.endswith("receive_logs.py") else script.expect
    expect(CONSUMERS[name], count=count, timeout=30)


def consumer(scripts: Scripts, name: str) -> Script:
    """Start a consumer and wait until it consumes."""
    started = scripts.start(name)
    expect_waiting(started, name)
    return started


def replaced(url: str, user: str = "guest:guest", port: int | None = None, path: str = "") -> str:
    """Return an AMQP URL with another user and password, port or virtual host."""
    parts = urlsplit(url)
    place = f"{parts.hostname}:{port or parts.port}"
    return parts._replace(netloc=f"{user}@{place}", path=path or parts.path).geturl()


def has_one_message(channel: BlockingChannel, queue: str) -> bool:
    """Say whether one message is ready in a queue."""
    return bool(channel.queue_declare(queue, passive=True).method.message_count == 1)


def one_line(script: Script) -> str:
    """Return the one line on standard error of a script that failed, printing nothing else."""
    assert script.wait() == 1, str(script)
    (line,) = script.err.seen
    assert line.startswith(" [!] ")
    assert SECRET not in line
    assert "guest:guest" not in line
    return line


# --- Errors: one line, no traceback, no password ---


def test_no_broker_is_one_line(scripts: Scripts) -> None:
    """A script that has nothing to wait for fails at once where no broker is."""
    nobody = replaced(scripts.amqp_url, user=f"guest:{SECRET}", port=free_port())
    for started in [scripts.start(name, amqp_url=nobody) for name in ONE_SHOT]:
        line = one_line(started)
        assert line == " [!] Cannot connect to RabbitMQ: [Errno 111] Connection refused"


def test_a_wrong_password_is_one_line(scripts: Scripts) -> None:
    """A wrong password stays wrong: consumers do not try again either."""
    url = replaced(scripts.amqp_url, user=f"guest:{SECRET}")
    for started in [scripts.start(name, amqp_url=url) for name in SCRIPTS]:
        assert "ACCESS_REFUSED - Login was refused" in one_line(started)


def test_a_wrong_virtual_host_is_one_line(scripts: Scripts) -> None:
    """The broker says which virtual host it does not know."""
    url = replaced(scripts.amqp_url, path="/nowhere")
    for started in [scripts.start(name, amqp_url=url) for name in SCRIPTS]:
        assert "NOT_ALLOWED - vhost nowhere not found" in one_line(started)


MALFORMED = [
    f"amqp://guest:{SECRET}/x@localhost/",
    f"amqp://guest:{SECRET}@localhost:70000/",
    f"amqp://guest:{SECRET}@localhost/?{SECRET}=1",
    f"amqp://guest:{SECRET}@[::1",
    f"amqp://guest:guest@localhost/?ssl_options={{{SECRET}",
    SECRET,
]


@pytest.mark.parametrize(
    "url", MALFORMED, ids=["slash", "port", "parameter", "host", "option", "no URL"]
)
def test_a_malformed_url_is_one_line(scripts: Scripts, url: str) -> None:
    """The line says what an AMQP URL is like; it does not show the one that is wrong."""
    for started in [scripts.start(name, amqp_url=url) for name in SCRIPTS]:
        line = one_line(started)
        assert line == " [!] AMQP_URL must look like amqp://user:password@host:5672/virtual_host"


@pytest.mark.parametrize("url", ["", " ", "\n"], ids=["empty", "space", "end of line"])
def test_an_empty_url_is_as_good_as_none(url: str) -> None:
    """A variable, or the file it comes from, that holds nothing: the broker is on this host."""
    shown = subprocess.check_output(
        [sys.executable, "-c", "import send; print(send.AMQP_URL)"],
        env=environment(AMQP_URL=url, PYTHONPATH=str(ROOT / "hello_world")),
        text=True,
    )
    assert shown == "amqp://guest:guest@localhost:5672/%2F\n"


def test_other_settings_are_one_line(scripts: Scripts, channel: BlockingChannel) -> None:
    """A queue or an exchange that exists with other settings is refused, and that is said."""
    for queue in ("hello", "task_queue", "rpc_queue"):
        channel.queue_declare(queue, durable=True, arguments={"x-max-length": 5})
    channel.exchange_declare("logs", "direct", durable=True)
    declaring = [name for name in SCRIPTS if name != "rpc/rpc_client.py"]  # its queue is its own
    for started in [scripts.start(name) for name in declaring]:
        assert "PRECONDITION_FAILED - inequivalent arg" in one_line(started)


def test_access_refused_is_one_line(broker: Broker, scripts: Scripts) -> None:
    """A user without permissions for a queue or an exchange is told so."""
    virtual_host = virtual_host_of(scripts.amqp_url)
    nothing = {"configure": "", "write": "", "read": ""}
    broker.api("PUT", "users/newcomer", {"password": SECRET, "tags": ""})
    try:
        broker.api("PUT", f"permissions/{virtual_host}/newcomer", nothing)
        url = replaced(scripts.amqp_url, user=f"newcomer:{quote(SECRET)}")
        for started in [scripts.start(name, amqp_url=url) for name in SCRIPTS]:
            line = one_line(started)
            assert "ACCESS_REFUSED - " in line
            assert "'newcomer'" in line
    finally:
        broker.api("DELETE", "users/newcomer")


def test_a_refused_message_is_no_message_sent(broker: Broker, scripts: Scripts) -> None:
    """A user who may declare and read, but not write: what the broker refuses was not sent."""
    virtual_host = virtual_host_of(scripts.amqp_url)
    reader = {"configure": ".*", "write": r"^(?!amq\.default$|logs$).*", "read": ".*"}
    scripts.run("hello_world/send.py")
    serving = consumer(scripts, "rpc/rpc_server.py")
    broker.api("PUT", "users/reader", {"password": SECRET, "tags": ""})
    try:
        broker.api("PUT", f"permissions/{virtual_host}/reader", reader)
        url = replaced(scripts.amqp_url, user=f"reader:{quote(SECRET)}")
        *producers, client = [scripts.start(name, amqp_url=url) for name in ONE_SHOT]
        for started in producers:
            assert re.search("ACCESS_REFUSED - .*(amq.default|logs)", one_line(started))
            assert started.out.seen == []
        told = " [!] RabbitMQ refused a request, and closed the channel"
        assert one_line(client) == told
    finally:
        broker.api("DELETE", "users/reader")
    assert serving.out.seen == [CONSUMERS["rpc/rpc_server.py"]]


def test_a_broker_that_is_silent_is_one_line(scripts: Scripts) -> None:
    """A host that accepts the connection and says nothing is given up after pika's timeout."""
    with closing(Proxy(scripts.amqp_url, lambda *_: False)) as silent:
        url = f"{silent.url}?stack_timeout=1"
        for started in [scripts.start(name, amqp_url=url) for name in ONE_SHOT]:
            assert one_line(started).startswith(" [!] Cannot connect to RabbitMQ: Timeout")
        for started in [scripts.start(name, amqp_url=url) for name in CONSUMERS]:
            started.expect_error(re.compile(r" \[!\] Cannot connect to RabbitMQ: Timeout.*"))


# --- AMQP_URL: what pika understands in it ---


def test_an_amqps_url_is_encrypted(scripts: Scripts, tmp_path: Path) -> None:
    """amqps and ssl_options work as pika's URLParameters says; a stranger's certificate is one
    line."""
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
        one_line(scripts.start("hello_world/send.py", amqp_url=untrusting))
        scripts.run("hello_world/send.py", amqp_url=url)
        started = scripts.start("hello_world/receive.py", amqp_url=f"amqp://127.0.0.2:1,{url}")
        started.expect(" [x] Received 'Hello World!'")


# --- Consumers wait for a broker, and return to it ---


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_consumers_outlive_a_broker_restart(
    own_broker: Broker, scripts: Scripts, amqp_url: str, end: str
) -> None:
    """Each says in one line that the broker is lost, waits, and goes on by itself; so does one
    that starts before the broker. A worker and a server in the middle of their work, too."""
    lost = re.compile(r" \[!\] .+; trying again every second")
    consumers = [(name, consumer(scripts, name)) for name in CONSUMERS]
    scripts.run("work_queues/new_task.py", "task.....")
    consumers[1][1].expect(" [x] Received 'task.....'")
    client = scripts.start("rpc/rpc_client.py", "--timeout", "60", *["33"] * 10)
    consumers[3][1].expect(" [.] fib(33)")

    getattr(own_broker, end)()
    try:
        one_line(client)
        early = [(name, scripts.start(name)) for name in CONSUMERS]
        for _, script in consumers[:1] + consumers[2:3] + early:
            script.expect_error(lost)
    finally:
        own_broker.start()

    for name, script in consumers:
        expect_waiting(script, name, count=2)
    for name, script in early:
        expect_waiting(script, name)
    for _, script in consumers + early:
        script.expect_error(lost)
        told = [line for line in script.err.seen if line.startswith(" [!]")]
        assert all(lost.fullmatch(line) for line in told)
        assert all(one != next_one for one, next_one in pairwise(told)), "no trouble is said twice"

    with closing(pika.BlockingConnection(pika.URLParameters(amqp_url))) as connection:
        channel = connection.channel()
        for i in range(2):
            channel.basic_publish("", "hello", f"message {i}".encode())
            channel.basic_publish("", "task_queue", f"task {i}".encode())
        channel.basic_publish("logs", "", b"log")

    def printed_by(place: int) -> set[str]:
        return {*consumers[place][1].out.seen, *early[place][1].out.seen}

    messages = {f" [x] Received 'message {i}'" for i in range(2)}
    eventually(lambda: messages <= printed_by(0), "both messages are printed")
    tasks = {f" [x] Received 'task {i}'" for i in range(2)} | {
        " [x] Received 'task.....' (redelivered)"
    }
    eventually(lambda: tasks <= printed_by(1), "all tasks are done, that in hand once more")
    for _, script in (consumers[2], early[2]):
        script.expect(" [x] log")
    assert scripts.run("rpc/rpc_client.py", "7").out.seen[-1] == " [.] Got 13"


# --- Ctrl+C and SIGTERM ---


@pytest.mark.parametrize("how", STOPS, ids=lambda how: how.name)
def test_an_idle_consumer_ends_at_once(scripts: Scripts, how: signal.Signals) -> None:
    """Within a second, with nothing on standard error and exit status 0."""
    for name, script in [(name, consumer(scripts, name)) for name in CONSUMERS]:
        assert script.stop(how) < 1, name
        assert script.process.returncode == 0
        assert [line for line in script.err.seen if line != CONSUMERS[name]] == []


@pytest.mark.parametrize("how", STOPS, ids=lambda how: how.name)
def test_a_consumer_that_waits_for_a_broker_ends_at_once(
    scripts: Scripts, how: signal.Signals
) -> None:
    """The same where there is no broker yet."""
    nobody = replaced(scripts.amqp_url, port=free_port())
    for script in [scripts.start(name, amqp_url=nobody) for name in CONSUMERS]:
        script.expect_error(re.compile(r" \[!\] Cannot connect .*"))
        assert script.stop(how) < 1
        assert script.process.returncode == 0
        assert len(script.err.seen) == 1


@pytest.mark.parametrize("how", STOPS, ids=lambda how: how.name)
def test_a_task_in_hand_goes_back_to_its_queue(
    scripts: Scripts, channel: BlockingChannel, how: signal.Signals
) -> None:
    """A worker and a server that are stopped in the middle of their work end within a second, and
    others get what they had."""
    worker, server = (consumer(scripts, n) for n in ("work_queues/worker.py", "rpc/rpc_server.py"))
    scripts.run("work_queues/new_task.py", "a long task..........")
    client = scripts.start("rpc/rpc_client.py", "35", "--timeout", "60")
    worker.expect(" [x] Received 'a long task..........'")
    server.expect(" [.] fib(35)")
    for script in (server, worker):
        assert script.stop(how) < 1
        assert script.process.returncode == 0
        assert script.err.seen == []
    for queue in ("task_queue", "rpc_queue"):
        eventually(
            partial(has_one_message, channel, queue),
            f"{queue} has it again",
        )
    assert client.stop(how) < 1
    assert client.process.returncode == 128 + how
    assert client.err.seen == []


@pytest.mark.parametrize("how", STOPS, ids=lambda how: how.name)
def test_a_producer_that_waits_for_the_broker_ends_at_once(
    scripts: Scripts, how: signal.Signals
) -> None:
    """A broker that hangs holds no script: it ends within a second, and has not said "Sent"."""
    with closing(Proxy(scripts.amqp_url, lambda *_: False)) as silent:
        producers = [scripts.start(name, amqp_url=silent.url) for name in ONE_SHOT]
        eventually(lambda: silent.connections == len(ONE_SHOT), "the scripts connect")
        for started in producers:
            assert started.stop(how) < 1
            assert started.process.returncode == 128 + how
            assert started.out.seen == started.err.seen == []


@pytest.mark.parametrize("how", STOPS, ids=lambda how: how.name)
def test_new_task_ends_at_once_while_it_waits_for_the_confirm(
    scripts: Scripts, how: signal.Signals
) -> None:
    """A task that is not confirmed is not reported as sent."""
    held: list[int] = []

    def watch(index: int, _to_broker: bool) -> bool:
        held.extend([index] * (index == ACK))
        return not held

    with closing(Proxy(scripts.amqp_url, watch)) as proxy:
        started = scripts.start("work_queues/new_task.py", amqp_url=proxy.url)
        eventually(lambda: held, "the broker confirms the task")
        assert started.stop(how) < 1
    assert started.process.returncode == 128 + how
    assert started.out.seen == started.err.seen == []


# --- Complete in itself ---


def test_each_script_runs_alone_with_pika_alone(scripts: Scripts, tmp_path: Path) -> None:
    """Copied into an empty folder, with nothing installed but pika, each script does its work."""
    installed = tmp_path / "installed"
    installed.mkdir()
    assert pika.__file__
    (installed / "pika").symlink_to(Path(pika.__file__).parent)
    env = environment(scripts.amqp_url, PYTHONPATH=str(installed))
    for name in [*CONSUMERS, *ONE_SHOT]:
        folder = tmp_path / Path(name).stem
        folder.mkdir()
        copy = Path(shutil.copy(ROOT / name, folder))
        # -S leaves out all that is installed beside the standard library
        script = Script([sys.executable, "-S", copy.name], env, cwd=folder)
        scripts.started.append(script)
        if name in CONSUMERS:
            expect_waiting(script, name)
        else:
            assert script.wait() == 0, str(script)
    receive, worker, receive_logs, _server = scripts.started[:4]
    receive.expect(" [x] Received 'Hello World!'")
    worker.expect(" [x] Received 'Hello...'")
    receive_logs.expect(" [x] info: Hello World!")
    assert scripts.started[-1].out.seen[-1] == " [.] Got 832040"


def parts_of(name: str) -> dict[str, str]:
    """Return the parts of a script that it shares with others, as they are written."""
    source = (ROOT / name).read_text()
    tree = ast.parse(source)
    found = {}
    for node in tree.body:
        text = ast.get_source_segment(source, node) or ""
        if isinstance(node, ast.FunctionDef) and node.name == "connect":
            found["connect"] = text
        elif isinstance(node, ast.Assign) and text.startswith("AMQP_URL"):
            found["AMQP_URL"] = text
        elif isinstance(node, ast.If):
            found["last lines"] = text
    return found


@pytest.mark.parametrize("names", [ONE_SHOT, list(CONSUMERS)], ids=["one shot", "consumers"])
def test_the_shared_lines_are_the_same_to_the_letter(names: list[str]) -> None:
    """What every script needs is written the same way in every script."""
    first, *others = [parts_of(name) for name in names]
    assert set(first) == {"connect", "AMQP_URL", "last lines"}
    assert others == [first] * 3
    head = {key: first[key] for key in ("connect", "AMQP_URL")}
    assert head == {key: parts_of(ONE_SHOT[0])[key] for key in head}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_pika_and_the_standard_library_alone(name: str) -> None:
    """Nothing of this project, and nothing else that would have to be installed."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names == {"pika"}


# --- Help and usage ---


def test_help_says_what_a_script_is_for(scripts: Scripts) -> None:
    """--help needs no broker; it shows the usage and what the script does."""
    nobody = replaced(scripts.amqp_url, port=free_port())
    for shown in [scripts.start(name, "--help", amqp_url=nobody) for name in SCRIPTS]:
        assert shown.wait() == 0
        assert shown.out.seen[0].startswith(f"usage: {shown.path.name} ")
        purpose = ast.get_docstring(ast.parse(shown.path.read_text()))
        assert purpose
        assert purpose in " ".join(" ".join(shown.out.seen).split())
        assert shown.err.seen == []


REFUSED = [(name, "--unknown") for name in SCRIPTS]
REFUSED += [(name, "extra") for name in CONSUMERS]
REFUSED += [("work_queues/worker.py", f"--prefetch={n}") for n in ("many", "-1", "65536")]
REFUSED += [("rpc/rpc_client.py", "ten"), ("rpc/rpc_client.py", "--timeout=soon")]


def test_what_a_script_does_not_know_is_refused(scripts: Scripts) -> None:
    """A usage line on standard error and exit status 2; it needs no broker."""
    nobody = replaced(scripts.amqp_url, port=free_port())
    for refused in [scripts.start(*call, amqp_url=nobody) for call in REFUSED]:
        assert refused.wait() == 2
        assert refused.out.seen == []
        assert refused.err.seen[0].startswith(f"usage: {refused.path.name} ")
        assert refused.err.seen[-1].startswith(f"{refused.path.name}: error: ")


def test_a_timeout_must_be_a_time(scripts: Scripts) -> None:
    """rpc_client.py refuses a timeout that is none, with a usage line."""
    for seconds in ("0", "-1", "nan", "inf"):
        refused = scripts.run("rpc/rpc_client.py", f"--timeout={seconds}", status=2)
        *usage, error = refused.err.all()
        assert all(line.startswith(("usage", " ")) for line in usage)
        assert error.startswith("rpc_client.py: error: timeout must be")
