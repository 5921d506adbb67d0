"""The command: keeps a RabbitMQ for a reader's scripts (`make broker`), or installs what it needs.

RABBITMQ_PORT and RABBITMQ_MANAGEMENT_PORT change its ports.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import socket
import sys

from tools.broker import LocalNode, NoBroker, choose, install


def speaks_amqp(port: int) -> bool:
    """Say whether a broker answers on a port of this machine. Raises NoBroker if others do."""
    try:
        with socket.create_connection(("localhost", port), timeout=5) as probe:
            probe.sendall(b"AMQP\0\0\x09\x01")
            answer = probe.recv(8)
    except ConnectionRefusedError:
        return False
    except OSError:
        answer = b""
    if answer[:1] == b"\x01":  # a method: connection.start
        return True
    raise NoBroker(f"Port {port} is taken, and not by a broker that is ready")


def serve(choice: str) -> None:
    """Keep a broker on localhost for a reader's scripts, until Ctrl+C or SIGTERM."""
    port = int(os.environ.get("RABBITMQ_PORT") or 5672)
    management_port = int(os.environ.get("RABBITMQ_MANAGEMENT_PORT") or 15672)
    if not speaks_amqp(port):
        install(choice)
    if speaks_amqp(port):
        print(f"A broker is already running on localhost:{port}. Use that one, or stop it first.")
        print("(If it is the service of Debian's package: sudo systemctl stop rabbitmq-server)")
        return
    kind, why = choose(choice)
    print(f"Starting RabbitMQ, {kind.kind}" + (f" ({why})" if why else ""), flush=True)
    with contextlib.closing(kind(port, management_port)) as broker:
        print(f"RabbitMQ is on localhost:{port} until you press Ctrl+C.")
        print(f"Its management page is http://localhost:{management_port} (guest, guest).")
        print("Type this in each of your other terminals:")
        if sys.prefix != sys.base_prefix:
            print(f"    . {os.path.relpath(sys.prefix)}/bin/activate")
        if port != 5672:
            print(f"    export AMQP_URL=amqp://guest:guest@localhost:{port}/%2F")
        if isinstance(broker, LocalNode):
            print(f"    alias rabbitmqctl={shlex.quote(shlex.join(broker.rabbitmqctl_command))}")
        sys.stdout.flush()
        signal.pause()


def main() -> None:
    """Run the command."""
    description = "Keep a RabbitMQ on localhost:5672 until Ctrl+C."
    parser = argparse.ArgumentParser(prog="python -m tools.broker", description=description)
    parser.add_argument("--broker", default="auto", metavar="auto|container|local")
    parser.add_argument(
        "--install", action="store_true", help="install rabbitmq-server if needed, and end"
    )
    options = parser.parse_args()

    def stop(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        sys.exit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        (install if options.install else serve)(options.broker)
    except NoBroker as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
