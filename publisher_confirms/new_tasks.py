"""Send each line of a file, or of standard input, as a task to the queue 'task_queue'."""

import argparse
import os
import queue
import re
import signal
import sys
import threading
import time
from collections import deque
from itertools import takewhile

import pika
from pika.adapters.select_connection import IOLoop
from pika.exceptions import AMQPConnectionError, AMQPError, ChannelClosedByBroker


def main():
    options = parser.parse_args()
    publisher = Publisher(open(options.file, "rb"), options.window)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, publisher.on_signal)
    publisher.run()
    print(f" [x] Sent {publisher.taken} tasks")


class Publisher:
    """Sends the lines of a file as tasks, and keeps each task until RabbitMQ has confirmed it.

    A task is a pair: the number of a line, and the line itself. When it has been read, it waits in
    `lines`. When it is sent, it moves to `unconfirmed`. When it is confirmed, it is removed. If it
    must be sent again, it waits in `again`.
    """

    def __init__(self, file, window):
        self.file = file
        self.window = window  # how many tasks there may be in `unconfirmed` and `again` together
        self.lines = queue.Queue(maxsize=window)
        self.unconfirmed = {}  # by delivery tag, in the order in which they were sent
        self.again = deque()
        self.taken = 0  # how many tasks have left `lines`
        self.ended = False  # whether all lines have been taken
        self.read_error = None  # why no more lines could be read
        self.resent = 0  # how many tasks were sent again after a connection was lost
        self.ioloop = IOLoop()  # waits for RabbitMQ, and calls our methods when something happens
        self.channel = None
        self.worked = False  # whether RabbitMQ has ever accepted our connection and our queue
        self.silence = 0  # for how many seconds no confirm has come, though tasks are unconfirmed
        self.calm = 0  # for how many seconds no task was rejected and no connection was lost
        self.reported = ""
        self.begin = time.monotonic()
        self.shows_progress = os.isatty(2) and not file.isatty()

    def run(self):
        """Send all tasks. If the connection is lost, connect again.

        Raises AMQPError, or OSError if a line cannot be read.
        """
        threading.Thread(target=self.read, daemon=True).start()
        self.show_progress()
        self.watch()
        while True:
            for broker in brokers():
                self.use(broker)
                if self.is_done():
                    return self.finish()
            if not self.worked:
                raise self.error
            self.report(f"{self.error}; trying again every second")
            time.sleep(1)

    def read(self):
        """Read the lines. This runs in a thread of its own, because it has to wait for them."""
        try:
            for number, line in enumerate(self.file, start=1):
                self.put((number, line.removesuffix(b"\n")))
        except Exception as error:
            self.read_error = error  # finish() raises it, when all lines before it are confirmed
        self.put(None)  # there are no more lines

    def put(self, task):
        self.lines.put(task)  # waits while `lines` is full
        if self.lines.qsize() == 1:  # it was empty, so send() may have given up
            self.ioloop.add_callback_threadsafe(self.send)

    # --- Sending, and RabbitMQ's answers: all this runs in the main thread, where pika runs ---

    def use(self, broker):
        """Connect to this broker, and send tasks until all are confirmed or the connection ends."""
        self.error = None
        pika.SelectConnection(
            broker,
            on_open_callback=self.on_open,
            on_open_error_callback=self.on_open_error,
            on_close_callback=self.on_close,
            custom_ioloop=self.ioloop,
        )
        self.ioloop.start()  # until on_close stops it
        # 403 is "access refused", 406 is "precondition failed"
        if isinstance(self.error, ChannelClosedByBroker) and self.error.reply_code in (403, 406):
            # RabbitMQ will never accept this: a task that is too large, for example.
            raise AMQPError(f"{self.error}. {self.how_far()}")

    def on_open(self, connection):
        connection.add_on_connection_blocked_callback(self.on_blocked)
        connection.channel(on_open_callback=self.on_channel_open)

    def on_channel_open(self, channel):
        self.channel = channel
        self.tag = 0  # RabbitMQ numbers the tasks on each channel from 1, and so do we
        channel.add_on_close_callback(self.on_channel_close)
        channel.add_on_return_callback(self.on_return)
        channel.queue_declare(queue="task_queue", durable=True)
        channel.confirm_delivery(ack_nack_callback=self.on_confirm, callback=self.on_ready)

    def on_ready(self, frame):
        self.worked = True
        self.reported = ""
        self.send_again()
        self.send()

    def send(self):
        """Send new tasks while there are any and the window has room for them."""
        while self.is_open() and not self.ended and self.in_window() < self.window:
            try:
                task = self.lines.get_nowait()
            except queue.Empty:
                return  # put() will call us
            if task is None:
                self.ended = True
            else:
                self.publish(task)
                self.taken += 1
        if self.is_done() and self.is_open():
            self.channel.connection.close()

    def send_again(self):
        while self.again and self.is_open():
            self.publish(self.again[0])  # it stays in `again` until it is sent: how_far() counts it
            self.again.popleft()

    def publish(self, task):
        _number, line = task
        self.tag += 1
        self.unconfirmed[self.tag] = task
        self.channel.basic_publish(
            exchange="",
            routing_key="task_queue",
            body=line,
            properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent),
            mandatory=True,
        )

    def on_confirm(self, frame):
        """Remove from `unconfirmed` what RabbitMQ has stored, or rejected."""
        if not self.is_open():
            return  # on_return has closed the connection
        self.silence = 0
        tags = [frame.method.delivery_tag]
        if frame.method.multiple:  # it is about all tasks up to this one
            tags = list(takewhile(lambda tag: tag <= frame.method.delivery_tag, self.unconfirmed))
        if isinstance(frame.method, pika.spec.Basic.Nack):
            self.on_reject([self.unconfirmed[tag] for tag in tags])
        for tag in tags:
            del self.unconfirmed[tag]
        self.send()

    def on_reject(self, tasks):
        self.report(
            "The queue rejects tasks, perhaps because it is full; trying again every second"
        )
        if not self.again:  # otherwise, send_again is going to be called already
            self.ioloop.call_later(1, self.send_again)
        self.again += tasks

    def on_return(self, channel, method, properties, body):
        """Begin again with a new connection: the queue is not there, and has to be declared.

        RabbitMQ returns the task, and then confirms it, although it has not stored it. So we
        ignore all confirms that come after this.
        """
        if self.is_open():
            channel.connection.close(404, "The queue is gone")

    def on_blocked(self, connection, frame):
        self.report(
            "RabbitMQ is short of memory or disk space, and takes no tasks until it has more"
        )

    def on_channel_close(self, channel, reason):
        self.error = reason
        if channel.connection.is_open:
            channel.connection.close()

    def on_open_error(self, connection, reason):
        if not re.search("ACCESS_REFUSED|NOT_ALLOWED", repr(reason)):  # password, virtual host
            reason = AMQPConnectionError(
                f"No RabbitMQ answers (docker compose up -d starts one): {reason!r}"
            )
        self.on_close(connection, reason)

    def on_close(self, connection, reason):
        self.error = self.error or reason
        self.resent += len(self.unconfirmed)  # perhaps only their confirms were lost
        self.again += self.unconfirmed.values()
        self.unconfirmed.clear()
        self.ioloop.stop()

    def is_open(self):
        return self.channel is not None and self.channel.is_open

    def in_window(self):
        return len(self.unconfirmed) + len(self.again)

    def is_done(self):
        return self.ended and self.in_window() == 0

    # --- What it tells you on standard error ---

    def how_far(self):
        # A signal may come at any moment. Then a task is perhaps in two places, or not yet counted.
        waiting = {number for number, _line in [*self.unconfirmed.values(), *self.again]}
        taken = max([self.taken, *waiting])
        return (
            f"{taken - len(waiting)} tasks are confirmed. "
            f"The first line that is not confirmed is line {min(waiting, default=taken + 1)}"
        )

    def show_progress(self):
        if self.shows_progress:
            confirmed = self.taken - self.in_window()
            rate = confirmed / (time.monotonic() - self.begin)
            line = f" [.] {confirmed} confirmed, {rate:.0f} per second "
            print(line, end="\r", file=sys.stderr, flush=True)  # the next line takes its place
            self.ioloop.call_later(0.1, self.show_progress)

    def watch(self):
        """Once a second, look whether confirms come, and whether earlier trouble is over."""
        self.silence = self.silence + 1 if self.unconfirmed else 0
        if self.silence == 10:
            self.report("No confirm for 10 seconds; still waiting")
        self.calm = self.calm + 1 if self.is_open() and not self.again else 0
        if self.calm >= 10:
            self.reported = ""  # if the trouble comes back, report it again
        self.ioloop.call_later(1, self.watch)

    def report(self, text):
        if text != self.reported:
            print(f" [!] {text}", file=sys.stderr)
        self.reported = text

    def finish(self):
        self.show_progress()
        if self.shows_progress:
            print(file=sys.stderr)
        if self.resent:
            self.report(f"{self.resent} tasks were sent again, and may be in the queue twice")
        if self.read_error:
            raise OSError(f"A line cannot be read: {self.read_error!r}. {self.how_far()}")

    def on_signal(self, number, frame):
        """Say how far we are, and end."""
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # we are about to end
        # Perhaps nobody reads our output. Then print() waits forever, so another thread calls it.
        text = f"Stopped. {self.how_far()}"
        telling = threading.Thread(target=self.report, args=[text], daemon=True)
        telling.start()
        telling.join(timeout=0.2)
        os._exit(128 + number)


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("file", nargs="?", default=0, metavar="FILE")
parser.add_argument(
    "--window", type=positive, default=1000, metavar="N", help="how many tasks may be unconfirmed"
)


# --- From here on, the code is almost that of all producers: see the end of lesson 1. ---

AMQP_URL = os.getenv("AMQP_URL") or "amqp://guest:guest@localhost:5672/%2F"


def brokers():
    """Return the brokers at AMQP_URL, which may list several."""
    try:
        return [pika.URLParameters(url.strip()) for url in AMQP_URL.split(",")]
    except Exception:  # do not print this exception: it may contain the password
        sys.exit(" [!] AMQP_URL must look like amqp://user:password@host:5672/virtual_host")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl+C and kill end the script at once
        signal.signal(number, lambda signum, frame: os._exit(128 + signum))
    try:
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)
        main()
    except (AMQPError, OSError) as error:  # OSError if the output is closed or full, for example
        try:
            print(f" [!] {error}", file=sys.stderr)
        finally:
            os._exit(1)  # sys.exit would try to write the rest of the output, and may fail again
