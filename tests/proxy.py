"""A proxy between a script and the broker: it sees each AMQP frame, and can act in between.

It makes moments certain that are otherwise a matter of luck: "after the answer was published and
before the acknowledgement arrived" is then simply where the frame of the acknowledgement is held.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable
from urllib.parse import urlsplit

from pika import amqp_object, frame
from pika.spec import Basic

from tools.broker import eventually

PUBLISH = Basic.Publish.INDEX
ACK = Basic.Ack.INDEX  # to the broker: a delivery; to a publisher: a confirm

# Called for each frame with its index (0 if it is no method) and whether it goes to the broker,
# before it is passed on; it is not passed on if this returns False.
Watch = Callable[[int, bool], bool]


def without(method: int) -> Watch:
    """Hold back all frames of a method."""
    return lambda index, _to_broker: index != method


class Proxy:
    """Listens on an address of this machine and passes on what comes, in both directions."""

    def __init__(
        self, amqp_url: str, watch: Watch = lambda *_: True, tls: ssl.SSLContext | None = None
    ) -> None:
        """Stand before the broker at `amqp_url`; `url` is then the address to give to a script.

        With `tls` it is that of a server with TLS.
        """
        parts = urlsplit(amqp_url)
        self._broker = (parts.hostname, parts.port or 5672)
        self._watch = watch
        self._tls = tls
        self._sockets: list[socket.socket] = []
        self.connections = 0
        self.to_broker: Counter[int] = Counter()  # how many frames have come, by their index
        self.to_client: Counter[int] = Counter()
        self._listener = socket.create_server(("127.0.0.2", 0))  # as if it were another host
        port = self._listener.getsockname()[1]
        user = parts.netloc.rpartition("@")[0]
        scheme = "amqps" if tls else "amqp"
        self.url = parts._replace(scheme=scheme, netloc=f"{user}@127.0.0.2:{port}").geturl()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._tls:
                    try:
                        client = self._tls.wrap_socket(client, server_side=True)
                    except ssl.SSLError:  # the client does not trust the certificate
                        continue
                self.connections += 1
                broker = socket.create_connection(self._broker)
                self._sockets += [client, broker]
                for source, target in ((client, broker), (broker, client)):
                    arguments = (source, target, target is broker)
                    threading.Thread(target=self._pass_on, args=arguments, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, to_broker: bool) -> None:
        with contextlib.suppress(OSError), source.makefile("rb") as stream:
            if to_broker:
                target.sendall(stream.read(8))  # the protocol header
            while header := stream.read(7):  # of a frame: type, channel, size of the payload
                kind, _, size = struct.unpack(">BHL", header)
                payload = stream.read(size + 1)  # and the byte that ends the frame
                index = int.from_bytes(payload[:4], "big") if kind == 1 else 0
                (self.to_broker if to_broker else self.to_client)[index] += 1
                if self._watch(index, to_broker):
                    target.sendall(header + payload)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def wait_for_heartbeats(self) -> None:
        """Wait for two seconds in which a client with heartbeat=1 lives on: it sends two a second.

        The first frames may be the content of what it has just published, which is no method.
        """
        before = self.to_broker[0]
        eventually(lambda: self.to_broker[0] > before + 4, "the client sends heartbeats")

    def say(self, method: amqp_object.Method) -> None:
        """Send a method on channel 1 to each client, as if the broker had sent it."""
        for client in self._sockets[::2]:
            client.sendall(frame.Method(1, method).marshal())

    def cut(self) -> None:
        """Cut the connections that there are."""
        while self._sockets:
            self._end(self._sockets.pop())

    def close(self) -> None:
        """Cut all connections, and accept no more."""
        self._end(self._listener)
        self.cut()

    def _end(self, its_socket: socket.socket) -> None:
        with contextlib.suppress(OSError):
            its_socket.shutdown(socket.SHUT_RDWR)
        its_socket.close()
