"""Do the tasks in the queue 'tasks', as a service: it is watched, and it stops without harm."""

import argparse
import json
import logging
import math
import os
import re
import signal
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

STOP = {signal.SIGINT, signal.SIGTERM}  # Ctrl+C, and how Docker and Kubernetes stop a program
if __name__ == "__main__":
    # From now on, these signals wait until on_signals asks for them. They never interrupt a thread.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)

import pika
import prometheus_client
from pika.exceptions import AMQPConnectionError, AMQPError, NackError, UnroutableError


def main(channel, options):
    """Do one task after the other, until we are asked to stop."""
    # The queues and their settings are in RabbitMQ (see definitions.json), and not in this script.
    channel.confirm_delivery()  # from now on, basic_publish waits until the task is stored
    channel.basic_qos(prefetch_count=options.prefetch)
    tasks = deque()  # those that RabbitMQ has sent to us, and that have not begun
    channel.basic_consume("tasks", lambda _channel, *task: tasks.append(task))
    log.info("waiting for tasks")
    health.ready = True
    while channel.consumer_tags:
        turn(channel, seconds=0.2)
        heed_stop(channel, tasks)
        if tasks:
            do_task(channel, tasks, *tasks.popleft())


def turn(channel, seconds=0):
    """Let pika receive tasks and send heartbeats. Raises AMQPError if we consume no more."""
    channel.connection.process_data_events(time_limit=seconds)
    health.alive_until = time.monotonic() + ALIVE
    if not channel.consumer_tags and not stopping.is_set():
        raise AMQPError("RabbitMQ has closed the channel or cancelled the consumer: see its log")


def heed_stop(channel, tasks):
    """If we are asked to stop, take no more tasks, and give those back that have not begun."""
    if stopping.is_set():
        for tag in channel.consumer_tags:  # none, if we have been here before
            log.info("stopping: no more tasks")
            channel.basic_cancel(tag)
        while tasks:
            channel.basic_nack(tasks.popleft()[0].delivery_tag, requeue=True)


def do_task(channel, tasks, method, properties, body):
    begin = time.monotonic()
    about = logging.LoggerAdapter(log, {"id": properties.message_id or "-"})
    about.info("begins%s", " (redelivered)" if method.redelivered else "")
    # The work is done in a second thread. Everything else is done here, in pika's thread.
    job = executor.submit(do, properties, body)
    try:
        while wait([job], timeout=0.2).not_done:
            turn(channel)
            heed_stop(channel, tasks)
    except AMQPError:
        job.cancel()  # if it has not begun, leave it: the task is in its queue again
        raise
    heed_stop(channel, tasks)  # once more: after the acknowledgement, RabbitMQ sends the next task
    seconds = time.monotonic() - begin
    error = job.exception()
    if error is None:
        channel.basic_ack(method.delivery_tag)
        result = "done"
        about.info("done in %.1f s", seconds)
    else:
        result = put_aside(channel, method, properties, body, error, about)
    SECONDS.observe(seconds)
    TASKS.labels(result).inc()


def do(properties, body):
    work(understand(body), properties.headers or {}, properties.message_id)


class PermanentError(Exception):
    """Raise this if it makes no sense to try again: the task is parked at once."""


def understand(body):
    """Return the task that these bytes are. Raises PermanentError."""
    try:
        task = json.loads(body)
        return {"name": str(task["name"]), "seconds": float(task["seconds"])}
    except Exception as error:
        raise PermanentError(f"this is not a task: {error!r:.200}") from None


def work(task, headers, message_id):
    """Put your own work here. It may take a long time, and it may raise an exception."""
    time.sleep(task["seconds"])


def put_aside(channel, method, properties, body, error, about):
    """Send a failed task to 'tasks.retry', or after its last try to 'tasks.parked'."""
    headers = properties.headers or {}
    now = time.strftime("%Y-%m-%d %H:%M:%S+00:00", time.gmtime())
    failures = headers.get("failures")
    failures = [*(failures if isinstance(failures, list) else []), f"{now} {error!r:.200}"]
    again = len(failures) < TRIES and not isinstance(error, PermanentError)
    result, queue = ("failed", "tasks.retry") if again else ("parked", "tasks.parked")
    text = f"failed ({len(failures)} of {TRIES}), goes to {queue}: {error!r:.200}"
    about.warning("%s", text, exc_info=error)
    # CC and BCC would send copies to other queues. RabbitMQ accepts no other user's name from us.
    headers = {name: value for name, value in headers.items() if name not in ("CC", "BCC")}
    properties.headers = headers | {"failures": failures}
    properties.expiration = properties.user_id = None
    health.alive_until = math.inf  # pika sends heartbeats, however long RabbitMQ takes to confirm
    try:
        channel.basic_publish("", queue, body, properties, mandatory=True)
    except (NackError, UnroutableError) as refusal:  # the queue is full, or not there
        about.error("RabbitMQ does not take it (%r), and parks it itself", refusal)
        channel.basic_reject(method.delivery_tag, requeue=False)  # it becomes a dead letter
        return "parked"
    # Acknowledge last: if we crash before this, the task is in both queues, but not lost.
    channel.basic_ack(method.delivery_tag)
    return result


TRIES = 3
executor = ThreadPoolExecutor(max_workers=1)


# --- Stopping ---


def on_signals(grace):
    """Wait for Ctrl+C or SIGTERM, and set the flag. This runs in a thread of its own."""
    signal.sigwait(STOP)
    stopping.set()
    limit = threading.Timer(grace, no_time_left)
    limit.daemon = True
    limit.start()
    signal.sigwait(STOP)  # a second signal
    os._exit(1)  # RabbitMQ sees that the connection is lost, and puts the task back


def no_time_left():
    log.error("no time left: a task that is not finished goes back to its queue")
    os._exit(1)


stopping = threading.Event()


# --- What others can see: the log, health and figures ---


class OneLine(logging.Formatter):
    """Makes one line of each event, also of a traceback."""

    def format(self, record):
        text = super().format(record)
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def start_log():
    handler = logging.StreamHandler()
    form = "%(asctime)s %(levelname)s %(id)s %(message)s"
    handler.setFormatter(OneLine(form, "%Y-%m-%dT%H:%M:%S%z", defaults={"id": "-"}))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # For each lost connection, pika logs several errors, and we log one. DEBUG shows all of pika's.
    logging.getLogger("pika").setLevel(logging.CRITICAL)


log = logging.getLogger("worker")


class Health(prometheus_client.MetricsHandler):
    """Answers GET /livez, /readyz and /metrics."""

    timeout = 10  # seconds; then a client that says nothing is cut off

    def handle(self):
        with suppress(OSError):  # a client that has gone is no event
            super().handle()

    def do_GET(self):  # noqa: N802
        checks = {
            "/livez": time.monotonic() < health.alive_until,
            "/readyz": health.ready and not stopping.is_set(),
        }
        if self.path == "/metrics":
            super().do_GET()
        else:
            yes = checks.get(self.path)
            self.send_response(404 if yes is None else 200 if yes else 503)
            self.end_headers()
            self.wfile.write(b"yes\n" if yes else b"no\n")


ALIVE = 60  # seconds; if pika's thread has not come round for so long, it is stuck
# "Alive" is about this process: if not, a restart helps. "Ready" is about RabbitMQ, too.
health = SimpleNamespace(alive_until=math.inf, ready=False)

TASKS = prometheus_client.Counter("worker_tasks", "Tries of tasks, by their result", ["result"])
SECONDS = prometheus_client.Histogram("worker_task_seconds", "How long a try of a task takes")
for each in ("done", "failed", "parked"):
    TASKS.labels(each)  # so that it is 0, and not missing, before the first task


def number(text):
    """Return the number, if it makes sense."""
    if not 1 <= int(text) <= 65535:
        raise ValueError
    return int(text)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--grace", type=number, default=25, metavar="SECONDS", help="after the signal")
parser.add_argument("--prefetch", type=number, default=1, metavar="N", help="tasks at one time")
parser.add_argument("--port", type=number, help="where to answer about health and figures")


# --- From here on, almost the same code as in all consumers: see the end of lesson 1. ---


def connect():
    """Connect to the first RabbitMQ in AMQP_URL that accepts us. Raises AMQPConnectionError."""
    urls = os.getenv("AMQP_URL", "amqp://guest:guest@localhost:5672/%2F")
    try:
        if "AMQP_URL_FILE" in os.environ:  # a file, as nobody can see what is in it from outside
            urls = Path(os.environ["AMQP_URL_FILE"]).read_text()
        urls.encode()  # raises an exception for bytes that are not UTF-8
        brokers = [pika.URLParameters(re.fullmatch(URL, u.strip())[0]) for u in urls.split(",")]
    except OSError as error:  # a file with certificates, for example
        raise AMQPConnectionError(f"AMQP_URL asks for what does not work: {error}") from None
    except Exception:  # do not print this exception: it may contain the password
        raise AMQPConnectionError(f"AMQP_URL must look like {EXAMPLE}") from None
    answers = []
    for broker in brokers:  # pika accepts a list, too, but gives up at a name it cannot resolve
        try:
            return pika.BlockingConnection(broker)
        except Exception as error:  # an error of pika, of the socket or of TLS
            cause = next((e.exception for e in error.args if hasattr(e, "exception")), error)
            answers.append(f"{broker.host}:{broker.port}: {cause}")
    raise AMQPConnectionError(f"No RabbitMQ accepts us: {'; '.join(answers)}")


URL = "amqps?://([^@/?#]*@)?[^@/?#:][^@/?#]*([/?][^@#]*)?"  # pika would take one without a host
EXAMPLE = "amqp://user:password@host:5672/virtual_host"


def run(options):
    """Consume until the script is stopped. Raises AMQPError for what stays wrong when it starts."""
    worked = False
    reported = ""
    while not stopping.is_set():
        health.alive_until = math.inf  # pika limits the time in which it connects
        try:
            with connect() as connection:
                main(connection.channel(), options)
                return
        except AMQPError as error:
            worked = worked or health.ready
            health.ready = False
            if not worked and re.search(HOPELESS, str(error)):
                raise
            if str(error) != reported:
                log.error("trying again every second: %s", error)
            reported = str(error)
        stopping.wait(1)


# A malformed AMQP_URL, a wrong password or virtual host, no permission, other settings of a queue
HOPELESS = "AMQP_URL|(ACCESS_REFUSED|NOT_ALLOWED|PRECONDITION_FAILED)(?!.* (reached|down|replica))"

if __name__ == "__main__":
    options = parser.parse_args()
    start_log()
    threading.Thread(target=on_signals, args=[options.grace], daemon=True).start()
    try:
        if options.port:
            server = ThreadingHTTPServer(("", options.port), Health)
            threading.Thread(target=server.serve_forever, daemon=True).start()
        run(options)
    except (AMQPError, OSError) as error:  # OSError if the port is taken, for example
        log.critical("%s", error)
        os._exit(1)
    executor.shutdown(cancel_futures=True)  # wait for a task whose connection was lost
    log.info("stopped")
