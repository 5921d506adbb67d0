"""What all scripts promise."""

from __future__ import annotations

import ast
import re
import shutil
import ssl
import subprocess
import sys
from contextlib import closing
from itertools import cycle
from pathlib import Path
from urllib.parse import quote

import pika
import pytest
import trustme
from pika.adapters.blocking_connection import BlockingChannel

from tests.proxy import Proxy
from tests.scripts import (
    CONSUMERS,
    NEEDED,
    NO_BROKER,
    OTHERS,
    PRODUCERS,
    SCRIPTS,
    SECRET,
    Script,
    Scripts,
    another_user,
    consumer,
    expect_waiting,
    one_line,
    replaced,
    start,
)
from tools import ROOT, environment
from tools.broker import Broker, free_port

# --- Errors: one line, no traceback, no password ---


def test_no_broker_is_one_line(scripts: Scripts) -> None:
    """A script that has nothing to wait for fails at once where no broker is."""
    nobody = replaced(scripts.amqp_url, user=f"guest:{SECRET}", port=free_port())
    for started in [start(scripts, name, amqp_url=nobody) for name in PRODUCERS]:
        line = one_line(started)
        assert line.startswith(NO_BROKER)
        assert "Connection refused" in line


def test_a_wrong_password_is_one_line(scripts: Scripts) -> None:
    """A wrong password stays wrong: consumers do not try again either."""
    url = replaced(scripts.amqp_url, user=f"guest:{SECRET}")
    for started in [start(scripts, name, amqp_url=url) for name in SCRIPTS]:
        assert "ACCESS_REFUSED - Login was refused" in one_line(started)


def test_a_wrong_virtual_host_is_one_line(scripts: Scripts) -> None:
    """The broker says which virtual host it does not know."""
    url = replaced(scripts.amqp_url, path="/nowhere")
    for started in [start(scripts, name, amqp_url=url) for name in SCRIPTS]:
        assert "NOT_ALLOWED - vhost nowhere not found" in one_line(started)


MALFORMED = [
    f"amqp://guest:{SECRET}/x@localhost/",
    f"amqp://guest:{SECRET}@localhost:70000/",
    f"amqp://guest:{SECRET}@localhost/?{SECRET}=1",
    f"amqp://guest:{SECRET}@[::1",
    f"amqp://guest:guest@localhost/?ssl_options={{{SECRET}",
    SECRET,
]


def test_a_malformed_url_is_one_line(scripts: Scripts) -> None:
    """The line says what an AMQP URL is like; it does not show the one that is wrong. Each script
    gets one of them, and new_tasks.py, which reads the URL in a way of its own, gets all."""
    pairs = [*zip(SCRIPTS, cycle(MALFORMED)), *((OTHERS[0], url) for url in MALFORMED)]
    for started in [start(scripts, name, amqp_url=url) for name, url in pairs]:
        line = one_line(started)
        assert line == " [!] AMQP_URL must look like amqp://user:password@host:5672/virtual_host"


def test_an_empty_url_is_as_good_as_none() -> None:
    """If the variable holds nothing, the broker is on this computer."""
    shown = subprocess.check_output(
        [sys.executable, "-c", "import send; print(send.AMQP_URL)"],
        env=environment(AMQP_URL="", PYTHONPATH=str(ROOT / "hello_world")),
        text=True,
    )
    assert shown == "amqp://guest:guest@localhost:5672/%2F\n"


def test_other_settings_are_one_line(scripts: Scripts, channel: BlockingChannel) -> None:
    """A queue or an exchange that exists with other settings is refused, and that is said."""
    for queue in ("hello", "task_queue", "rpc_queue"):
        channel.queue_declare(queue, durable=True, arguments={"x-max-length": 5})
    for exchange in ("logs", "direct_logs", "topic_logs"):
        channel.exchange_declare(exchange, "headers", durable=True)
    channel.queue_declare("tasks", durable=True)
    declaring = set(SCRIPTS) - {"rpc/rpc_client.py", *OTHERS[1:]}  # its queue is its own
    for started in [start(scripts, name) for name in declaring]:
        assert "PRECONDITION_FAILED - inequivalent arg" in one_line(started)


def test_access_refused_is_one_line(broker: Broker, scripts: Scripts) -> None:
    """A user without permissions for a queue or an exchange is told so."""
    with another_user(broker, scripts.amqp_url, "newcomer") as url:
        for started in [
            start(scripts, name, amqp_url=url) for name in SCRIPTS if name != OTHERS[2]
        ]:
            line = one_line(started)
            assert "ACCESS_REFUSED - " in line
            assert "'newcomer'" in line


def test_a_refused_message_is_no_message_sent(broker: Broker, scripts: Scripts) -> None:
    """A user who may declare and read, but not write: what the broker refuses was not sent."""
    reader = {"configure": ".*", "write": r"^(?!amq\.default$|.*logs$).*", "read": ".*"}
    scripts.run("hello_world/send.py")
    serving = consumer(scripts, "rpc/rpc_server.py")
    with another_user(broker, scripts.amqp_url, "reader", **reader) as url:
        *producers, client = [start(scripts, name, amqp_url=url) for name in PRODUCERS]
        for started in producers:
            assert re.search("ACCESS_REFUSED - .*(amq.default|logs)", one_line(started))
            assert started.out.seen == []
        told = re.compile(r" \[!\] .*ACCESS_REFUSED - write access to exchange .amq.default.*")
        assert told.fullmatch(one_line(client))
    assert serving.out.seen == [CONSUMERS["rpc/rpc_server.py"]]


def test_a_broker_that_is_silent_is_one_line(scripts: Scripts) -> None:
    """A host that accepts the connection and says nothing is given up after pika's timeout."""
    silence = re.escape(NO_BROKER) + ".*Timeout.*"
    with closing(Proxy(scripts.amqp_url, lambda *_: False)) as silent:
        url = f"{silent.url}?stack_timeout=1"
        for started in [start(scripts, name, amqp_url=url) for name in PRODUCERS]:
            assert re.fullmatch(silence, one_line(started))
        for started in [start(scripts, name, amqp_url=url) for name in CONSUMERS]:
            started.expect_error(re.compile(f"{silence}; trying again every second"))


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
        line = one_line(scripts.start("hello_world/send.py", amqp_url=untrusting))
        assert "CERTIFICATE_VERIFY_FAILED" in line
        scripts.run("hello_world/send.py", amqp_url=url)
        started = scripts.start("hello_world/receive.py", amqp_url=f"amqp://127.0.0.2:1,{url}")
        started.expect(" [x] Received 'Hello World!'")


# --- Complete in itself ---


def test_each_script_runs_alone_with_pika_alone(scripts: Scripts, tmp_path: Path) -> None:
    """Copied into an empty folder, with nothing installed but pika, each script does its work."""
    installed = tmp_path / "installed"
    installed.mkdir()
    assert pika.__file__
    (installed / "pika").symlink_to(Path(pika.__file__).parent)
    env = environment(scripts.amqp_url, PYTHONPATH=str(installed))
    running = {}
    for name in [*CONSUMERS, *PRODUCERS, *OTHERS]:
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        copy = Path(shutil.copy(ROOT / name, folder))
        # -S leaves out all that is installed beside the standard library
        command = [sys.executable, "-S", copy.name, *NEEDED.get(name, [])]
        running[name] = Script(command, env, cwd=folder)
        scripts.started.append(running[name])
        if name in CONSUMERS:
            expect_waiting(running[name])
        else:
            assert running[name].wait() == 0, str(running[name])
    for name, line in {
        "hello_world/receive.py": " [x] Received 'Hello World!'",
        "work_queues/worker.py": " [x] Received 'Hello...'",
        "publish_subscribe/receive_logs.py": " [x] info: Hello World!",
        "routing/receive_logs_direct.py": " [x] info:Hello World!",
        "topics/receive_logs_topic.py": " [x] anonymous.info:Hello World!",
        "rpc/rpc_client.py": " [.] Got 832040",
        "publisher_confirms/new_tasks.py": " [x] Sent 0 tasks",
        "dead_letters/worker.py": " [x] Received 'README.md'",
    }.items():
        running[name].expect(line)


def plumbing_of(name: str) -> str:
    """Return what stands in a script from the comment on, below which all scripts are the same."""
    return (ROOT / name).read_text().partition("\n# --- From here on, all ")[2]


def test_the_shared_lines_are_the_same_to_the_letter() -> None:
    """Below one comment line, all producers are the same, and so are all consumers."""
    for names in ([*PRODUCERS, *OTHERS[1:]], [*CONSUMERS]):
        assert len({plumbing_of(name) for name in names}) == 1
    producer, consumer = (plumbing_of(names[0]) for names in (PRODUCERS, [*CONSUMERS]))
    end = 'if __name__ == "__main__":'
    shared = producer.partition(end)[0].removeprefix("producers")
    assert "def connect():" in shared
    assert consumer.partition(end)[0].removeprefix("consumers") == shared


@pytest.mark.parametrize("name", [*PRODUCERS, *CONSUMERS])
def test_a_script_begins_with_the_lesson(name: str) -> None:
    """The first declaration stands within 26 lines, or 45 in the longest scripts."""
    lines = (ROOT / name).read_text().splitlines()
    first = next(i for i, line in enumerate(lines, 1) if re.search(r"channel\.\w+_declare\(", line))
    assert first <= (45 if name in ("rpc/rpc_client.py", "dead_letters/worker.py") else 26)


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


REFUSED: list[tuple[str, ...]] = [(name, "--unknown") for name in SCRIPTS]
REFUSED += [(name, "extra") for name in CONSUMERS if name not in NEEDED]
REFUSED += [(name,) for name in NEEDED]
REFUSED += [("publisher_confirms/new_tasks.py", "--window=0"), ("dead_letters/parked.py", "extra")]
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
