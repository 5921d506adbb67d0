"""Users with the least that a script needs, and TLS, by AMQP_URL and the environment alone.

The lesson plays, in containers, how two scripts use TLS with SSL_CERT_FILE, and what a message from
a false sender looks like.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import pika
import pytest
import trustme

from tests.proxy import Proxy
from tests.scripts import (
    CONSUMERS,
    EMIT_TOPIC,
    FILE_WORKER,
    NEEDED,
    NEW_FILE,
    NEW_TASK,
    NEW_TASKS,
    PARKED,
    RECEIVE,
    RECEIVE_TOPIC,
    RPC_CLIENT,
    RPC_SERVER,
    SCRIPTS,
    SEND,
    WORKER,
    Script,
    Scripts,
    another_user,
    consumer,
    expect_waiting,
    one_line,
    received,
    replaced,
    worker_that,
)
from tools import ROOT, TIMEOUT, environment
from tools.broker import Broker, Secure, eventually, virtual_host_of
from tools.lesson import blocks

LESSON = ROOT / "security" / "README.md"
KINDS = ("configure", "write", "read")


# --- Users: the table in the lesson says what each script needs ---


def rows() -> dict[str, dict[str, str]]:
    """Return the rows of the lesson's table: for each script, its pattern for each kind."""
    [table] = [block.source for block in blocks(LESSON) if block.source.startswith("script ")]
    head, *lines = (line.split() for line in table.splitlines())
    assert head == ["script", *KINDS]
    return {script: dict(zip(KINDS, patterns, strict=True)) for script, *patterns in lines}


ROWS = rows()


def alternatives(pattern: str) -> list[str]:
    """Return a, b and c for the pattern ^(a|b|c)$, and nothing for ^$."""
    match = re.fullmatch(r"\^\(?(.*?)\)?\$", pattern)
    assert match, pattern
    return match[1].split("|") if match[1] else []


def needed(script: str) -> list[tuple[str, str]]:
    """Return each kind of permission that a script needs, with the queue or the exchange."""
    return [(kind, name) for kind in KINDS for name in alternatives(ROWS[script][kind])]


def as_its_user(scripts: Scripts, broker: Broker, stack: ExitStack, name: str) -> str:
    """Make the user of a script, with the permissions of its row, and return its URL."""
    user = f"{name.replace('/', '-')}-{len(scripts.started)}"
    return stack.enter_context(another_user(broker, scripts.amqp_url, user, **ROWS[name]))


def test_each_script_is_in_the_table() -> None:
    """The table of the lesson has a row for each script."""
    assert set(ROWS) >= set(SCRIPTS)


# Who sends what to whom, and what the receiver prints then
PAIRS: dict[str, tuple[list[str], str, str]] = {
    SEND: ([], RECEIVE, received("Hello World!")),
    NEW_TASK: (["a"], WORKER, received("a")),
    "publish_subscribe/emit_log.py": (["a"], "publish_subscribe/receive_logs.py", " [x] a"),
    "routing/emit_log_direct.py": (["info", "a"], "routing/receive_logs_direct.py", " [x] info:a"),
    EMIT_TOPIC: (["kern", "a"], RECEIVE_TOPIC, " [x] kern:a"),
    RPC_CLIENT: (["6"], RPC_SERVER, " [.] fib(6)"),
    NEW_TASKS: (["LICENSE"], WORKER, received("MIT License")),
    NEW_FILE: (["LICENSE"], FILE_WORKER, received("LICENSE")),
}


@pytest.mark.parametrize("sender", PAIRS)
def test_two_scripts_work_with_the_permissions_of_their_rows(
    broker: Broker, scripts: Scripts, sender: str
) -> None:
    """Each of the two has a user of its own, and what the one sends arrives at the other."""
    arguments, receiver, line = PAIRS[sender]
    with ExitStack() as stack:
        url, receivers_url = (as_its_user(scripts, broker, stack, n) for n in (sender, receiver))
        receiving = consumer(scripts, receiver, amqp_url=receivers_url)
        sent = scripts.run(sender, *arguments, amqp_url=url)
        receiving.expect(line)
        assert [*sent.err.seen, *receiving.err.seen] in ([], [CONSUMERS[receiver]])
        if sender == RPC_CLIENT:
            assert sent.out.seen[-1] == " [.] Got 8"


def test_failed_tasks_are_handled_with_the_same_permissions(
    broker: Broker, scripts: Scripts, tmp_path: Path
) -> None:
    """A worker may send a failed task to the end of its queue, or to the parked tasks. parked.py
    may send it back from there."""
    with ExitStack() as stack:
        names = (WORKER, FILE_WORKER, PARKED)
        url, parking_url, parked_url = (as_its_user(scripts, broker, stack, n) for n in names)
        scripts.run(NEW_TASK, "failing")
        failing = scripts.start(worker_that(WORKER, "raise ValueError", tmp_path), amqp_url=url)
        failing.expect(received("failing"), count=2)
        parking = consumer(scripts, FILE_WORKER, "--tries=1", amqp_url=parking_url)
        scripts.run(NEW_FILE, "missing")
        parking.expect_error(re.compile(r" \[!\] 'missing' .*park.*"))
        sent = scripts.run(PARKED, "--send-back", amqp_url=parked_url)
        assert sent.out.seen[0] == " [x] 'missing'"
        parking.expect(received("missing"), count=2)


def refusal(broker: Broker, kind: str, what: str) -> re.Pattern[str]:
    """Return the line that tells a user which kind of permission it lacks, and for what."""
    if broker.version.startswith("3."):
        kind = ""  # RabbitMQ 3.10 does not say it
    elif what.endswith(r"'tasks\.parked'"):
        # RabbitMQ 4.3 lets a user look at a queue that it may configure, write or read, and says
        # "configure" to one that may do nothing.
        kind = f"({kind}|configure) "
    else:
        kind += " "
    return re.compile(
        rf" \[!\] .*ACCESS_REFUSED - {kind}access to {what} in .+ refused for user '\S+'.*"
    )


# Scripts that would not need a permission without a message in their queue. They work already
# when they notice that they may not send.
LATER = {WORKER: "task_queue", RPC_SERVER: "rpc_queue", PARKED: "tasks.parked"}


def prepare(amqp_url: str, script: str) -> None:
    """Put a message into the queue of a script that needs one."""
    with pika.BlockingConnection(pika.URLParameters(amqp_url)) as connection:
        channel = connection.channel()
        channel.queue_declare(LATER[script], durable=True)
        request = pika.BasicProperties(reply_to="nobody")
        channel.basic_publish("", LATER[script], b"1", request)


@pytest.mark.parametrize("script", ROWS)
def test_a_script_with_one_permission_less_says_which(
    broker: Broker, scripts: Scripts, tmp_path: Path, script: str
) -> None:
    """Without any one of the permissions of its row, a script says in one line which one it lacks.
    It ends, unless it notices this only when it works already."""
    needs = NEEDED | {NEW_TASKS: ["LICENSE"], PARKED: ["--send-back"]}
    path = worker_that(script, "raise ValueError", tmp_path) if script == WORKER else script
    command = [path, *needs.get(script, [])]
    started: list[tuple[Script, str, str]] = []
    with ExitStack() as stack:
        for kind, name in needed(script):
            rest = [each for each in alternatives(ROWS[script][kind]) if each != name]
            less = ROWS[script] | {kind: f"^({'|'.join(rest)})$"}
            number = len(started)
            # Whether a permission is needed may depend on whether a queue is there already.
            fresh = stack.enter_context(broker.virtual_host(f"without-{number}-{os.getpid()}"))
            url = stack.enter_context(another_user(broker, fresh, f"without-{number}", **less))
            if script in LATER:
                prepare(fresh, script)
            started.append((scripts.start(*command, amqp_url=url), kind, name))
        for ended, kind, name in started:
            told = refusal(broker, kind, f"(queue|exchange) '{name}'")
            if kind == "write" and script in LATER:
                ended.expect_error(told)
            else:
                assert told.fullmatch(one_line(ended))
            assert "Traceback" not in "".join(ended.err.seen)
            ended.kill()


def test_topic_permissions_limit_what_a_user_may_say_and_hear(
    broker: Broker, scripts: Scripts
) -> None:
    """A user may send only logs whose routing key fits a pattern, and bind only such keys."""
    limits = {"exchange": "topic_logs", "write": r"^kern\.", "read": r"^kern\."}
    topic = "topic '{}' in exchange 'topic_logs'"
    everything = dict.fromkeys(KINDS, ".*")
    scripts.run(EMIT_TOPIC)  # it declares the exchange
    with another_user(broker, scripts.amqp_url, "kernel", **everything) as url:
        broker.api("PUT", f"topic-permissions/{virtual_host_of(url)}/kernel", limits)
        listening = consumer(scripts, RECEIVE_TOPIC, "kern.*", amqp_url=url)
        scripts.run(EMIT_TOPIC, "kern.info", "a", amqp_url=url)
        sent = scripts.start(EMIT_TOPIC, "auth.info", "b", amqp_url=url)
        greedy = scripts.start(RECEIVE_TOPIC, "#", amqp_url=url)
        assert refusal(broker, "write", topic.format("auth.info")).fullmatch(one_line(sent))
        assert refusal(broker, "read", topic.format("#")).fullmatch(one_line(greedy))
        listening.expect(" [x] kern.info:a")


def test_a_password_can_come_from_standard_input(
    own_broker: Broker, scripts: Scripts, tmp_path: Path
) -> None:
    """`rabbitmqctl add_user NAME <FILE` takes the password from the file, so that no list of
    processes shows it."""
    password = tmp_path / "password"
    password.write_text("a1b2c3\n")
    command = [*own_broker.rabbitmqctl_command, "add_user", "reader"]
    with password.open() as file:
        subprocess.run(command, stdin=file, check=True, capture_output=True, timeout=TIMEOUT)
    try:
        allowed = dict.fromkeys(KINDS, ".*")
        own_broker.api("PUT", f"permissions/{virtual_host_of(scripts.amqp_url)}/reader", allowed)
        url = replaced(scripts.amqp_url, user="reader:a1b2c3")
        scripts.run(SEND, amqp_url=url)
    finally:
        own_broker.api("DELETE", "users/reader")


# --- TLS: what each mistake looks like, and that RabbitMQ's certificate may be replaced ---

UNKNOWN = "certificate verify failed: unable to get local issuer certificate"
MISMATCH = "certificate verify failed: IP address mismatch, certificate is not valid for"
EXPIRED = "certificate verify failed: certificate has expired"
NO_TLS = "wrong version number"
NO_TLS_NEWER = "record layer failure"  # of a newer OpenSSL
NO_FILE = "AMQP_URL asks for what does not work: [Errno 2] No such file or directory"


def server(authority: trustme.CA, name: str = "127.0.0.2", days: int = 1) -> ssl.SSLContext:
    """Return the TLS of a server with a certificate for a name, valid for a number of days."""
    end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=days)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, not_after=end).configure_cert(tls)
    return tls


def refused(script: Script, *causes: str) -> None:
    """Expect the one line of a producer that is told why nobody accepts it: its address and one of
    these causes, which the lesson has in its table."""
    table = [line for line in LESSON.read_text().splitlines() if line.startswith("| `")]
    assert all(any(f"`{cause}" in row for row in table) for cause in causes), causes
    line = one_line(script)
    assert any(cause in line for cause in causes)
    assert causes == (NO_FILE,) or re.match(r" \[!\] No RabbitMQ accepts us: [\w.]+:\d+: ", line)


@pytest.mark.parametrize("server_is", ["unknown", "another", "expired"])
def test_a_server_that_cannot_prove_who_it_is_gets_nothing(
    scripts: Scripts, tmp_path: Path, server_is: str
) -> None:
    """Nobody that we trust has signed its certificate, or it has another name, or it has expired:
    a producer says why in one line. A consumer, too, and it goes on by itself when the certificate
    is replaced by a good one."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls, cause = {
        "unknown": (server(trustme.CA()), UNKNOWN),
        "another": (server(authority, "127.0.0.3"), MISMATCH),
        "expired": (server(authority, days=-1), EXPIRED),
    }[server_is]
    with (
        scripts.environment(SSL_CERT_FILE=str(tmp_path / "ca.pem")),
        closing(Proxy(scripts.amqp_url, tls=tls)) as proxy,
    ):
        refused(scripts.start(SEND, amqp_url=proxy.url), cause)
        receiving = scripts.start(RECEIVE, amqp_url=proxy.url)
        told = rf" \[!\] No RabbitMQ accepts us: .*{re.escape(cause)}.*; trying again every second"
        receiving.expect_error(re.compile(told))
        assert proxy.connections == 0

        authority.issue_cert("127.0.0.2").configure_cert(tls)
        expect_waiting(receiving)
        scripts.run(SEND, amqp_url=proxy.url)
        receiving.expect(received("Hello World!"))
        assert len(receiving.err.seen) == 1


def test_a_url_can_name_the_authority_and_the_server(scripts: Scripts, tmp_path: Path) -> None:
    """The certificate is for another name than the one in the URL, and SSL_CERT_FILE is not set. A
    file that is not there, and a RabbitMQ that speaks plain AMQP, are one line."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    options = f"?ssl_options={{'cafile':'{tmp_path}/ca.pem'%2C'server_hostname':'localhost'}}"
    with closing(Proxy(scripts.amqp_url, tls=server(authority, "localhost"))) as proxy:
        scripts.run(SEND, amqp_url=proxy.url + options)
        refused(scripts.start(SEND, amqp_url=proxy.url), UNKNOWN)
        refused(scripts.start(SEND, amqp_url=proxy.url + options.replace("ca.", "no.")), NO_FILE)
    plain = scripts.amqp_url.replace("amqp://", "amqps://")
    refused(scripts.start(SEND, amqp_url=plain), NO_TLS, NO_TLS_NEWER)


# --- The RabbitMQ of the lesson: security/make_certificates.sh and security/docker-compose.yml ---


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the lesson's script has made, beside a copy of the script."""
    folder = tmp_path_factory.mktemp("security")
    script = shutil.copy(LESSON.with_name("make_certificates.sh"), folder)
    subprocess.run([script], check=True, capture_output=True)
    return folder / "certificates"


@pytest.fixture(scope="module")
def secure(containers: None, certificates: Path) -> Iterator[Secure]:  # noqa: ARG001
    """RabbitMQ as the lesson starts it."""
    with closing(Secure(certificates)) as started:
        started.start()
        yield started


def test_nobody_else_on_this_computer_can_read_the_keys(certificates: Path) -> None:
    """The folder is for its owner alone. In it, RabbitMQ's key can be read by its container."""
    assert certificates.stat().st_mode & 0o777 == 0o700
    assert (certificates / "server.key").stat().st_mode & 0o777 == 0o644
    assert (certificates / "ca.key").stat().st_mode & 0o777 == 0o600


def test_the_certificates_are_strict(certificates: Path) -> None:
    """They are good enough for the strict check, which Python makes since 3.13."""
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname"]
    files = ["-CAfile", str(certificates / "ca.pem"), str(certificates / "server.pem")]
    subprocess.run([*command, "localhost", *files], check=True, capture_output=True)


def test_a_new_users_password_is_on_no_command_line(tmp_path: Path) -> None:
    """add_user.sh gives it to rabbitmqctl on its standard input, and writes it to a file that only
    its owner can read."""
    script = Path(shutil.copy(LESSON.with_name("add_user.sh"), tmp_path))
    docker = tmp_path / "docker"  # it writes down how it is called
    docker.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/called\ncat >>{tmp_path}/input\n')
    docker.chmod(0o755)
    env = environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name in ("one", "two"):
        subprocess.run([script, name, "^a$", "^b$", "^$"], env=env, check=True, timeout=TIMEOUT)
    files = [tmp_path / "users" / name for name in ("one", "two")]
    passwords = [urlsplit(file.read_text()).password or "" for file in files]
    assert (tmp_path / "input").read_text().split() == passwords
    assert len(set(passwords)) == 2
    assert all(len(password) == 32 for password in passwords)
    called = (tmp_path / "called").read_text()
    assert "rabbitmqctl set_permissions two ^a$ ^b$ ^$" in called
    assert not any(password in called for password in passwords)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert files[0].parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.cluster
def test_the_certificate_is_renewed_without_a_restart(secure: Secure, certificates: Path) -> None:
    """The lesson's script makes a new certificate, signed by the same authority. RabbitMQ reads it
    from time to time. Connections that are open stay open."""

    def shown() -> str:
        """Return the certificate that RabbitMQ shows."""
        return ssl.get_server_certificate(("localhost", urlsplit(secure.amqp_url).port or 0))

    before = shown()
    assert before in (certificates / "server.pem").read_text()
    with (
        closing(Scripts(secure.amqp_url)) as scripts,
        scripts.environment(SSL_CERT_FILE=str(certificates / "ca.pem")),
    ):
        receiving = consumer(scripts, RECEIVE)
        script = certificates.with_name("make_certificates.sh")
        subprocess.run([script], check=True, capture_output=True)
        secure.rabbitmqctl("eval", "ssl:clear_pem_cache().")  # which happens every two minutes
        eventually(lambda: shown() != before, "RabbitMQ shows another certificate")
        assert shown() in (certificates / "server.pem").read_text()
        scripts.run(SEND)
        receiving.expect(received("Hello World!"))
        assert receiving.err.seen == []


@pytest.mark.cluster
def test_the_broker_of_the_lesson_listens_with_tls_only(secure: Secure) -> None:
    """On this computer only, and on no other port."""
    container = secure.compose("ps", "-q").strip()
    [state] = json.loads(subprocess.check_output(["docker", "inspect", container]))
    published = {port: to for port, to in state["NetworkSettings"]["Ports"].items() if to}
    assert published.keys() == {"5671/tcp"}
    assert {to["HostIp"] for bindings in published.values() for to in bindings} == {"127.0.0.1"}
    assert "port: 5672," not in secure.rabbitmqctl("-q", "status").partition("Listeners")[2]
