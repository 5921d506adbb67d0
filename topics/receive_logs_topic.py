"""Print each log line whose routing key fits a given pattern, such as kern.* or #.critical."""

import argparse
import os
import re
import signal
import sys
import time

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl+C and kill end the script at once
        signal.signal(number, lambda *_: os._exit(0))

import pika
from pika.exceptions import AMQPConnectionError, AMQPError


def main(channel, options):
    channel.exchange_declare(exchange="topic_logs", exchange_type="topic")

    # A queue of our own, as in lesson 3.
    queue = channel.queue_declare(queue="", exclusive=True).method.queue

    # A binding key is a pattern: * stands for exactly one word, # for any number, even none.
    for binding_key in options.binding_keys:
        channel.queue_bind(queue=queue, exchange="topic_logs", routing_key=binding_key)
    channel.basic_consume(queue=queue, on_message_callback=on_log, auto_ack=True)
    print(" [*] Waiting for logs. To exit press CTRL+C", file=sys.stderr)


def on_log(channel, method, properties, body):
    text = body.decode(errors="surrogateescape")
    print(" [x]", one_line(f"{method.routing_key}:{text}"))


def one_line(text):
    """Escape line ends and control characters as repr does it, but without its quotes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def routing_key(text):
    """Return the text, if it can be a routing key."""
    if len(text.encode()) > 255:  # raises ValueError for bytes that are not UTF-8
        raise argparse.ArgumentTypeError("a routing key has at most 255 bytes")
    return text


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("binding_keys", type=routing_key, nargs="+", metavar="BINDING_KEY")


# --- From here on, all consumers have the same code: see the end of lesson 1 (hello_world). ---


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


def run(options):
    """Consume until the script is stopped. Raises AMQPError for what stays wrong when it starts."""
    worked = False
    reported = ""
    while True:
        try:
            with connect() as connection:
                channel = connection.channel()
                main(channel, options)
                worked = True  # from now on, errors of RabbitMQ may be temporary
                channel.start_consuming()
                # It returns when it has no consumer any more: the queue was deleted, for example.
                raise AMQPError("RabbitMQ cancelled the consumer")
        except AMQPError as error:
            if not worked and re.search(HOPELESS, str(error)):
                raise
            if str(error) != reported:
                print(f" [!] {error}; trying again every second", file=sys.stderr)
            reported = str(error)
        time.sleep(1)


# A malformed AMQP_URL, a wrong password or virtual host, no permission, other settings of a queue
HOPELESS = "AMQP_URL|(ACCESS_REFUSED|NOT_ALLOWED|PRECONDITION_FAILED)(?!.* (reached|down|replica))"

if __name__ == "__main__":
    try:
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)
        sys.stderr = sys.stderr or open(os.devnull, "w")  # if standard error is closed
        run(parser.parse_args())
    except (AMQPError, OSError) as error:  # OSError if the output is closed or full, for example
        try:
            print(f" [!] {error}", file=sys.stderr)
        finally:
            os._exit(1)  # sys.exit would try to write the rest of the output, and may fail again
