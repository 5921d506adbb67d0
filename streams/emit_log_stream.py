"""Write one line, or each line of standard input, to the stream 'log_stream'."""

import argparse
import os
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends the script at once, as kill does

import pika
from pika.exceptions import AMQPConnectionError, AMQPError


def main():
    message = parser.parse_args().message
    with connect() as connection:
        channel = connection.channel()
        timer = start_timer()

        # A stream is a queue of another type, and it is always durable.
        channel.queue_declare("log_stream", durable=True, arguments={"x-queue-type": "stream"})
        channel.confirm_delivery()  # from now on, basic_publish waits until the line is stored
        timer.cancel()

        one_line = [os.fsencode(" ".join(message))]
        for line in lines_of_input(connection) if message == ["-"] else one_line:
            timer = start_timer()
            channel.basic_publish(
                exchange="",
                routing_key="log_stream",
                body=line,
                properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent),
                mandatory=True,  # it is an error if there is no stream any more
            )
            timer.cancel()
            print(f" [x] Sent {os.fsdecode(line)!r}")


def lines_of_input(connection):
    """Give each line as soon as it comes. While there is none, pika sends heartbeats."""
    reader = ThreadPoolExecutor(max_workers=1)
    while True:
        job = reader.submit(sys.stdin.buffer.readline)
        while wait([job], timeout=1).not_done:
            connection.process_data_events()
        if not job.result():
            return  # the input has ended
        yield job.result().removesuffix(b"\n")


def start_timer():
    timer = threading.Timer(10, give_up)  # pika would wait for RabbitMQ without a limit
    timer.start()
    return timer


def give_up():
    try:
        print(" [!] No confirm within 10 s: nobody knows if the line is stored", file=sys.stderr)
    finally:
        os._exit(1)  # to close the connection, we would have to wait for RabbitMQ again


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "message",
    nargs="*",
    default=["info: Hello World!"],
    metavar="MESSAGE",
    help="the line; - stands for the lines of standard input",
)


# --- From here on, all producers have the same code: see the end of lesson 1 (hello_world). ---


def connect():
    """Connect to the first RabbitMQ in AMQP_URL that accepts us. Raises AMQPConnectionError."""
    urls = os.getenv("AMQP_URL", "amqp://guest:guest@localhost:5672/%2F")
    try:
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


if __name__ == "__main__":
    try:
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)
        main()
    except (AMQPError, OSError) as error:  # OSError if the output is closed or full, for example
        try:
            print(f" [!] {error}", file=sys.stderr)
        finally:
            os._exit(1)  # sys.exit would try to write the rest of the output, and may fail again
