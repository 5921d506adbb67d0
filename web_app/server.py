"""A web server. It puts each task that it gets into the queue 'task_queue', for worker.py."""

import argparse
import json
import logging
import signal
import socket
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C works also while pika is imported

from publisher import Publisher, PublishError

MAX_LENGTH = 1_000_000  # bytes of a request


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one client. There is a thread for each client."""

    protocol_version = "HTTP/1.1"  # a client may send one request after the other
    timeout = 5  # how many seconds we wait for a client that sends nothing or reads nothing
    wbufsize = -1  # send each answer in one piece

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if self.path != "/tasks":
            self.answer(404, error="Tasks go to /tasks")
        elif not length.isdecimal():
            self.answer(411, error="The request has no Content-Length")
        elif len(length) > 9 or int(length) > MAX_LENGTH:
            self.answer(413, error=f"The limit is {MAX_LENGTH} bytes")
        else:
            body = self.rfile.read(int(length))
            if len(body) == int(length):
                self.publish_task(body)
            else:  # the client has gone, or we stop: without an answer, it sends all of it again
                self.close_connection = True

    def publish_task(self, body):
        try:
            task = json.loads(body)["task"].encode()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return self.answer(400, error='A task looks like this: {"task": "Hello..."}')
        try:
            message_id = self.server.publisher.publish(task).result()  # waits for the confirm
        except PublishError as error:
            return self.answer(503, error=str(error))
        return self.answer(202, id=message_id)

    def do_GET(self):
        if self.path != "/health":
            self.answer(404, error="There is only /health")
        elif self.server.publisher.is_ready():
            self.answer(200, rabbitmq="reachable")
        else:
            self.answer(503, rabbitmq="not reachable")

    def answer(self, status, **content):
        body = json.dumps(content).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 503:
            self.send_header("Retry-After", "5")  # seconds
        if status >= 400:
            self.send_header("Connection", "close")  # perhaps we have not read the whole request
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Print no line for each request."""


class Server(ThreadingHTTPServer):
    daemon_threads = False  # server_close() waits for the threads
    request_queue_size = 1000  # how many clients may come at the same moment

    def __init__(self, address):
        super().__init__(address, Handler)
        self.clients = set()
        self.publisher = Publisher("task_queue")
        self.publisher.is_ready()  # connects now, not at the first request

    def process_request(self, client, address):
        self.clients.add(client)
        super().process_request(client, address)

    def shutdown_request(self, client):
        self.clients.discard(client)
        super().shutdown_request(client)

    def close(self):
        """Answer the requests that we have got. Then end."""
        for client in list(self.clients):
            with suppress(OSError):  # it has gone
                client.shutdown(socket.SHUT_RD)  # its thread reads what has come, and no more
        self.server_close()
        self.publisher.close()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that has gone is no error
            super().handle_error(request, client_address)


def main():
    options = parser.parse_args()
    server = Server(("127.0.0.1", options.port))

    def stop(number, frame):
        """End serve_forever(). A second signal ends the script at once."""
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        threading.Thread(target=server.shutdown).start()  # it waits for serve_forever()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    print(f" [*] Waiting at http://127.0.0.1:{server.server_port}/tasks. To exit press CTRL+C")
    server.serve_forever()
    server.close()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any that is free")

if __name__ == "__main__":
    try:
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)
        logging.basicConfig(format=" [!] %(message)s")
        logging.getLogger("pika").propagate = False  # publisher.py says what went wrong
        main()
    except (OSError, ValueError, OverflowError) as error:  # the port is in use, for example
        sys.exit(f" [!] {error}")
