"""Four ways in which a web server should not publish. Each sends to the queue 'task_queue'."""

import argparse
import os
import signal
import sys
import threading
import time
from collections import Counter

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends the script at once

import pika
from pika.exceptions import AMQPError

URL = os.getenv("AMQP_URL", "amqp://guest:guest@localhost:5672/%2F").split(",")[0]


def each():
    """Open a connection for each message."""
    count, end = 0, time.monotonic() + 3
    while time.monotonic() < end:
        channel = open_channel()
        channel.confirm_delivery()
        publish(channel)
        channel.connection.close()
        count += 1
    print(f" [x] {count / 3:.0f} messages per second")


def idle():
    """Open a connection, do something else for some seconds, and then publish."""
    channel = open_channel(heartbeat=1)  # RabbitMQ's default is 60 seconds
    time.sleep(5)
    for _ in range(3):
        print(f" [x] {result_of(publish, channel)}")


def shared():
    """Share one connection among eight threads, which send 400 messages each."""
    channel = open_channel()
    results = Counter()

    def run():
        for _ in range(400):
            results[result_of(publish, channel)] += 1

    threads = [threading.Thread(target=run, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)  # some may wait forever
    for result, count in results.most_common():
        print(f" [x] {count} times: {result}")


def fork():
    """Open a connection and fork three children. Each child sends 50 messages on it."""
    stored = count_messages()
    channel = open_channel()
    for _ in range(3):
        if os.fork() == 0:
            signal.alarm(5)  # it may wait forever
            for _ in range(50):
                result_of(publish, channel)
            os._exit(0)
    for _ in range(3):
        os.wait()
    print(f" [x] {count_messages() - stored} of 150 messages are in the queue")


def open_channel(heartbeat=None):
    parameters = pika.URLParameters(URL)
    parameters.heartbeat = heartbeat
    channel = pika.BlockingConnection(parameters).channel()
    channel.queue_declare("task_queue", durable=True)
    return channel


def publish(channel):
    channel.basic_publish("", "task_queue", b"a wrong way")


def count_messages():
    return open_channel().queue_declare("task_queue", passive=True).method.message_count


def result_of(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return type(error).__name__
    return "sent"


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("way", choices=["each", "idle", "shared", "fork"])

if __name__ == "__main__":
    try:
        globals()[parser.parse_args().way]()
    except (AMQPError, OSError) as error:
        sys.exit(f" [!] {type(error).__name__}")
