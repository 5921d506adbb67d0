"""Send each line of a file, or of standard input, as a task to the queue 'task_queue'."""

import argparse
import os
import re
import select
import signal
import sys
import threading
import time
from collections import deque
from itertools import count, cycle, takewhile

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main(), Ctrl+C ends the script at once

import pika
from pika.adapters.select_connection import IOLoop
from pika.exceptions import AMQPConnectionError, AMQPError

STORED = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
TOO_LONG = 2**27  # RabbitMQ 3 accepts tasks of up to 128 MiB, and RabbitMQ 4 of up to 16 MiB
NO_MEMORY = "RabbitMQ is short of memory or disk space, and takes no tasks until it has more"


def main():
    options = parser.parse_args()
    if options.window < 1:
        parser.error("the window must be at least 1")
    publisher = Publisher(open(options.file, "rb"), options.window)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, publisher.on_signal)
    publisher.run(brokers())
    print(f" [x] Sent {publisher.confirmed} tasks")


class Publisher:
    """Sends the lines of a file as tasks, and keeps each line until RabbitMQ has confirmed it."""

    def __init__(self, file, window):
        self.lines = {}  # by number: the lines that were sent, and are not confirmed
        self.sent = {}  # by delivery tag: the number of each line that waits for a confirm
        self.confirmed = 0  # how many lines are confirmed
        self.again = set()  # the numbers of lines whose confirms were perhaps lost
        self.file, self.window = file, window
        self.fresh = deque()  # the lines that come next
        self.places = threading.Semaphore(2 * window)  # one for each line in `lines` and `fresh`
        self.done, self.read_error = False, None  # whether all is confirmed, and what went wrong
        self.ioloop = IOLoop()  # waits for RabbitMQ, and calls our methods when something happens
        self.channel = self.begin = None  # what RabbitMQ has opened for us, and when it first did
        self.silence = self.calm = 0  # for how many seconds there was no answer, and no trouble
        self.reported = set()

    def run(self, brokers):
        """Send all lines. If the connection is lost, go on with the next broker."""
        threading.Thread(target=self.read, daemon=True).start()
        self.watch()
        answers = []
        for broker in cycle(brokers):
            self.error, self.silence = None, 0
            pika.SelectConnection(broker, self.on_open, self.on_close, self.on_close, self.ioloop)
            self.ioloop.start()  # until on_close stops it
            if self.done and self.begin:
                break
            if self.begin and getattr(self.error, "reply_code", 0) in (403, 406):
                raise AMQPError(f"{self.error}. {self.how_far()}")  # it will never be accepted
            answers.append(f"{broker.host}:{broker.port}: {self.error}")
            if len(answers) == len(brokers):
                text = "; ".join(answers)
                if not self.begin:
                    raise AMQPConnectionError(f"No RabbitMQ accepts us: {text}")
                self.report(f"{text}; trying again every second")
                answers.clear()
                time.sleep(1)
        self.watch(end="\n")
        if self.again:
            self.report(f"{len(self.again)} tasks were sent again, and may be in the queue twice")
        if self.read_error:
            raise OSError(f"A line cannot be read: {self.read_error!r}. {self.how_far()}")

    def read(self):
        """Read the lines. This runs in a thread of its own, because it has to wait for them."""
        try:
            os.set_blocking(self.file.fileno(), True)  # otherwise "nothing yet" looks like the end
            while line := self.file.readline(TOO_LONG):
                if len(line) == TOO_LONG:
                    raise ValueError("it has 128 MiB or more")
                self.places.acquire()  # waits until there is one
                self.fresh.append(line.removesuffix(b"\n").removesuffix(b"\r"))
                if len(self.fresh) == 1:  # otherwise send() is going to be called already
                    self.ioloop.add_callback_threadsafe(self.send)
        except Exception as error:
            self.read_error = error
        for _ in range(2 * self.window):  # when we have all places, all lines are confirmed
            self.places.acquire()
        self.done = True
        self.ioloop.add_callback_threadsafe(self.send)

    def on_open(self, connection):
        connection.add_on_connection_blocked_callback(lambda *_: self.report(NO_MEMORY))
        connection.channel(on_open_callback=self.on_channel)

    def on_channel(self, channel):
        channel.add_on_close_callback(self.on_end)
        channel.add_on_return_callback(lambda *_: self.on_end(channel, "The queue is gone"))
        channel.queue_declare(queue="task_queue", durable=True)
        channel.confirm_delivery(self.on_confirm, callback=lambda _: self.on_ready(channel))

    def on_ready(self, channel):
        self.channel, self.begin = channel, self.begin or time.monotonic()
        self.tags = count(1)  # RabbitMQ numbers the tasks on each channel, and so do we
        self.send(resend=True)

    def send(self, resend=False):
        """Send new lines while the window has room, and maybe those that are not sent any more."""
        if not self.channel:
            return  # on_ready calls this again
        unsent = sorted(self.lines.keys() - self.sent.values()) if resend else []
        while self.fresh and len(self.lines) < self.window:
            unsent.append(self.confirmed + len(self.lines) + 1)
            self.lines[unsent[-1]] = self.fresh.popleft()
        for number in unsent:
            self.sent[next(self.tags)] = number
            self.channel.basic_publish("", "task_queue", self.lines[number], STORED, mandatory=True)
        if self.done:
            self.on_end(self.channel, "All is confirmed")

    def on_confirm(self, frame):
        if not self.channel:
            return  # RabbitMQ confirms a task that it has returned, although it is not stored
        self.silence = 0
        last, multiple = frame.method.delivery_tag, frame.method.multiple
        tags = takewhile(lambda tag: tag <= last, list(self.sent)) if multiple else [last]
        numbers = [self.sent.pop(tag) for tag in tags]
        if isinstance(frame.method, pika.spec.Basic.Nack):
            self.report("The queue rejects tasks, perhaps it is full; trying again every second")
            return  # these lines stay in `lines`, so watch() will send them again
        for number in numbers:
            del self.lines[number]
        self.confirmed += len(numbers)
        self.places.release(len(numbers))
        self.send()

    def on_end(self, channel, reason):
        self.channel, self.error = None, self.error or reason
        if channel.connection.is_open:
            channel.connection.close()

    def on_close(self, connection, reason):
        wrapped = [e.exceptions[-1] for e in (reason, *reason.args) if hasattr(e, "exceptions")]
        self.error = self.error or next((getattr(e, "exception", e) for e in wrapped), reason)
        self.again.update(self.sent.values())  # perhaps only their confirms were lost
        self.sent.clear()
        self.ioloop.stop()

    def how_far(self):
        first = min(self.lines, default=self.confirmed + 1)
        return f"{self.confirmed} tasks are confirmed. Go on from line {first}"

    def watch(self, end="\r"):  # the next line of progress takes the place of this one
        self.ioloop.call_later(1, self.watch)
        if self.begin and os.isatty(2) and not self.file.isatty():
            rate = self.confirmed / (time.monotonic() - self.begin)
            line = f" [.] {self.confirmed} confirmed, {rate:.0f} per second "
            print(line, end=end, file=sys.stderr)
        self.send(resend=True)  # what RabbitMQ has rejected
        self.silence = self.silence + 1 if self.sent or not self.channel else 0
        if self.silence == 10 and NO_MEMORY not in self.reported:
            self.report("No answer from RabbitMQ for 10 seconds; still waiting")
        self.calm = self.calm + 1 if self.silence < 2 else 0
        if self.calm == 3:
            self.reported.clear()  # if there is trouble again, report it again

    def report(self, text):
        self.calm = 0
        if text not in self.reported:
            print(f" [!] {text}", file=sys.stderr)
        self.reported.add(text)

    def on_signal(self, number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second one ends the script at once
        if select.select([], [2], [], 0.2)[1]:  # otherwise nobody reads it: do not wait
            os.write(2, f" [!] Stopped. {self.how_far()}\n".encode())
        os.kill(os.getpid(), number)  # so that a loop of the shell ends, too
        os._exit(128 + number)  # the first process of a container outlives such a signal


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("file", nargs="?", default=0, metavar="FILE")
parser.add_argument("--window", type=int, default=1000, help="how many may be unconfirmed")


# --- From here on, the code is almost that of all producers: see the end of lesson 1. ---

URL = "amqps?://([^@/?#]*@)?[^@/?#:][^@/?#]*([/?][^@#]*)?"  # pika would take one without a host
EXAMPLE = "amqp://user:password@host:5672/virtual_host"


def brokers():
    """Return the brokers in AMQP_URL, which may list several. Raises AMQPConnectionError."""
    urls = os.getenv("AMQP_URL", "amqp://guest:guest@localhost:5672/%2F")
    try:
        urls.encode()  # raises an exception for bytes that are not UTF-8
        return [pika.URLParameters(re.fullmatch(URL, u.strip())[0]) for u in urls.split(",")]
    except OSError as error:  # a file with certificates, for example
        raise AMQPConnectionError(f"AMQP_URL asks for what does not work: {error}") from None
    except Exception:  # do not print this exception: it may contain the password
        raise AMQPConnectionError(f"AMQP_URL must look like {EXAMPLE}") from None


if __name__ == "__main__":
    try:
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)
        sys.stderr = sys.stderr or open(os.devnull, "w")  # if standard error is closed
        main()
    except (AMQPError, OSError) as error:  # OSError if the output is closed or full, for example
        try:
            print(f" [!] {error}", file=sys.stderr)
        finally:
            os._exit(1)  # sys.exit would try to write the rest of the output, and may fail again
