"""A publisher for web servers and other programs that do not end. Copy this file into yours.

publisher = Publisher("task_queue")
publisher.publish("Hello...").result()                    # in a thread: waits for the confirm
await asyncio.wrap_future(publisher.publish("Hello..."))  # in asyncio
"""

import logging
import os
import re
import threading
import time
import uuid
from collections import deque
from concurrent.futures import Future
from itertools import takewhile

import pika
from pika.adapters.select_connection import IOLoop

log = logging.getLogger(__name__)


class PublishError(Exception):
    """RabbitMQ has not confirmed the message. The classes below say why."""


class ReturnedError(PublishError):
    """There was no queue for the message, so it is not stored."""


class RejectedError(PublishError):
    """The queue did not take the message, perhaps because it is full."""


class UnconfirmedError(PublishError):
    """No confirm came in time. Nobody knows whether the message is stored."""


class Publisher:
    """Sends messages to one queue. All threads of a program share one Publisher.

    A message waits in `unsent`, and then in `sent` until RabbitMQ confirms it. If the connection is
    lost, it goes back to `unsent`, to be sent again.
    """

    def __init__(self, queue, url=None, timeout=5, limit=1000):
        self.queue = queue
        default = os.getenv("AMQP_URL", "amqp://guest:guest@localhost:5672/%2F")
        self.brokers = brokers(default if url is None else url)
        self.timeout = timeout  # after so many seconds, each Future is done
        self.limit = limit  # how many messages may be unsent or unconfirmed
        self.reset()
        os.register_at_fork(after_in_child=self.reset)  # a fork does not copy our thread

    def reset(self):
        self.lock = threading.Lock()
        self.thread = None
        self.unsent = deque()
        self.sent = {}  # by delivery tag
        self.channel = None  # None while we are not connected
        self.losses = 0  # how often we got no connection, or lost it
        self.reported = set()
        self.is_late = False  # whether a message in `sent` was not confirmed in time
        self.is_closed = False

    # --- What a program calls, in any thread ---

    def publish(self, body, **properties):
        """Return a Future. Its result is the message id, or it raises a PublishError."""
        message = Message(body, properties, time.monotonic() + self.timeout)
        with self.lock:
            if self.is_closed or len(self.unsent) + len(self.sent) >= self.limit:
                raise PublishError("Closed" if self.is_closed else "Too many messages wait already")
            self.start()
            self.unsent.append(message)
            if len(self.unsent) == 1:  # otherwise, send() is about to be called, or runs
                self.ioloop.add_callback_threadsafe(self.send)
        return message

    def is_ready(self):
        """Tell whether we are connected, and RabbitMQ confirms in time."""
        with self.lock:
            self.start()
        return self.channel is not None and not self.is_late

    def close(self):
        """Wait until each message is confirmed or has failed, and close the connection."""
        with self.lock:
            self.is_closed = True
            thread = self.thread
        if thread:
            thread.join()

    def start(self):
        if not self.thread and not self.is_closed:
            self.ioloop = IOLoop()  # waits for RabbitMQ, and calls our methods
            thread = threading.Thread(target=self.run, name="publisher", daemon=True)
            thread.start()
            self.thread = thread  # not before it has started: it may fail to

    # --- What runs in our own thread. Only this thread uses pika ---

    def run(self):
        try:
            self.connect()
            self.watch()
            self.ioloop.start()  # until it is stopped
        finally:  # also after an exception in pika; the next publish() then starts a new thread
            with self.lock:
                messages = [*self.sent.values(), *self.unsent]
                self.sent.clear()
                self.unsent.clear()
                self.channel = self.thread = None
            for message in messages:  # without the lock: a callback of theirs may publish again
                message.fail(UnconfirmedError("The publisher has ended"))

    def connect(self):
        pika.SelectConnection(
            self.broker(),
            on_open_callback=self.on_open,
            on_open_error_callback=self.on_lost,
            on_close_callback=self.on_lost,
            custom_ioloop=self.ioloop,
        )

    def broker(self):
        return self.brokers[self.losses % len(self.brokers)]

    def on_open(self, connection):
        connection.channel(on_open_callback=self.on_channel_open)

    def on_channel_open(self, channel):
        channel.add_on_close_callback(self.on_channel_close)
        channel.add_on_return_callback(self.on_return)
        channel.queue_declare(self.queue, durable=True)
        channel.confirm_delivery(self.on_confirm, callback=lambda _frame: self.on_ready(channel))

    def on_ready(self, channel):
        self.channel = channel
        self.tag = 0  # RabbitMQ numbers the messages on each channel from 1, and so do we
        self.reported.clear()
        self.send()

    def send(self):
        while self.channel and self.unsent:
            message = self.unsent.popleft()
            try:
                self.channel.basic_publish(
                    "", self.queue, message.body, message.properties, mandatory=True
                )
            except Exception as error:  # a property with a wrong type, for example
                message.fail(error)
            else:
                self.tag += 1
                self.sent[self.tag] = message

    def on_return(self, channel, method, properties, body):
        """Fail this message. RabbitMQ will confirm it, too, although it has not stored it."""
        for message in self.sent.values():
            if message.properties.message_id == properties.message_id:
                message.fail(ReturnedError(method.reply_text))
        channel.queue_declare(self.queue, durable=True)  # for the messages after it

    def on_confirm(self, frame):
        tags = [frame.method.delivery_tag]
        if frame.method.multiple:  # it is about all messages up to this one
            tags = list(takewhile(lambda tag: tag <= frame.method.delivery_tag, self.sent))
        for message in map(self.sent.pop, tags):
            if isinstance(frame.method, pika.spec.Basic.Nack):
                message.fail(RejectedError("The queue does not take the message"))
            elif not message.done():
                message.set_result(message.properties.message_id)

    def on_channel_close(self, channel, reason):
        self.channel = None
        if channel.connection.is_open:  # RabbitMQ has closed only the channel
            for message in self.sent.values():  # it refuses one of these: do not send them again
                message.fail(UnconfirmedError(reason.reply_text))
            channel.connection.close(reason.reply_code, reason.reply_text)

    def on_lost(self, connection, error):
        """Connect to the next address. After the last one, wait for a second."""
        self.channel = None
        self.unsent.extendleft(m for m in reversed(self.sent.values()) if not m.done())
        self.sent.clear()
        broker = self.broker()
        cause = re.sub(".*last exception - (.*); first exception.*", r"\1", repr(error))
        report = f"{broker.host}:{broker.port}: {cause}"
        if report not in self.reported and not self.is_closed:
            log.warning("No connection to RabbitMQ at %s; trying again", report)
        self.reported.add(report)
        self.losses += 1
        self.ioloop.call_later(0 if self.losses % len(self.brokers) else 1, self.connect)

    def watch(self):
        """Ten times per second, fail what was not confirmed in time, and look whether to end."""
        now = time.monotonic()
        while self.unsent and self.unsent[0].deadline < now:
            self.unsent.popleft().fail(UnconfirmedError(f"No confirm in {self.timeout} seconds"))
        late = [message for message in self.sent.values() if message.deadline < now]
        for message in late:  # it stays in `sent`, so it still counts for the limit
            message.fail(UnconfirmedError(f"No confirm in {self.timeout} seconds"))
        self.is_late = bool(late)
        if not self.is_closed or self.unsent or len(late) < len(self.sent):
            self.ioloop.call_later(0.1, self.watch)
        else:
            self.finish()

    def finish(self):
        if self.channel:
            self.channel.connection.add_on_close_callback(lambda *_: self.ioloop.stop())
            self.channel.connection.close()
        self.ioloop.call_later(1 if self.channel else 0, self.ioloop.stop)


class Message(Future):
    """A message, and the Future that is done when it is confirmed or has failed."""

    def __init__(self, body, properties, deadline):
        super().__init__()
        self.set_running_or_notify_cancel()  # nobody can cancel it: perhaps it is sent already
        self.body = body
        self.deadline = deadline
        default = {
            "content_type": "text/plain",
            "delivery_mode": pika.DeliveryMode.Persistent,
            "message_id": uuid.uuid4().hex,
            "timestamp": int(time.time()),
        }
        self.properties = pika.BasicProperties(**default | properties)

    def fail(self, error):
        if not self.done():
            self.set_exception(error)


def brokers(urls):
    """Return the parameters of each RabbitMQ in a list of URLs, separated by commas."""
    try:
        urls.encode()  # raises an exception for bytes that are not UTF-8
        found = [pika.URLParameters(re.fullmatch(URL, u.strip())[0]) for u in urls.split(",")]
    except OSError as error:  # a file with certificates, for example
        raise ValueError(f"AMQP_URL asks for what does not work: {error}") from None
    except Exception:  # do not print this exception: it may contain the password
        raise ValueError(f"AMQP_URL must look like {EXAMPLE}") from None
    for broker in found:
        if broker.heartbeat is None:
            broker.heartbeat = 10  # we notice within half a minute that RabbitMQ does not answer
    return found


URL = "amqps?://([^@/?#]*@)?[^@/?#:][^@/?#]*([/?][^@#]*)?"  # pika would take one without a host
EXAMPLE = "amqp://user:password@host:5672/virtual_host"
