"""Answer the requests in the queue 'rpc_queue' with Fibonacci numbers."""

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
    channel.queue_declare(queue="rpc_queue", durable=True)
    channel.basic_qos(prefetch_count=1)  # the next request goes to a server that is free
    channel.basic_consume(queue="rpc_queue", on_message_callback=on_request)
    print(" [x] Awaiting RPC requests")


def on_request(channel, method, properties, body):
    # If RabbitMQ refuses our answer, it closes the channel, and the request comes again. The second
    # answer gets a channel of its own, so that this one can acknowledge the request in any case.
    answers = channel.connection.channel() if method.redelivered else channel
    if properties.reply_to:  # without it, nobody waits for an answer
        kind, text = answer(body)
        answers.basic_publish(
            exchange="",
            routing_key=properties.reply_to,
            body=text.encode(),
            properties=pika.BasicProperties(correlation_id=properties.correlation_id, type=kind),
        )
    # Acknowledge last: if this server crashes before this, another one gets the request.
    channel.basic_ack(delivery_tag=method.delivery_tag)
    if method.redelivered and answers.is_open:
        answers.close()


def answer(body):
    """Return the type of the answer, "result" or "error", and its text."""
    try:
        n = int(body)
    except ValueError:  # words, nothing at all, or bytes that are not text
        n = -1
    if not 0 <= n <= 40:
        return "error", "not a whole number from 0 to 40"
    print(f" [.] fib({n})")
    return "result", str(fib(n))


def fib(n):
    """Return the n-th Fibonacci number, slowly on purpose: it stands for expensive work.

    fib(40) takes ten seconds or more. Work that takes minutes belongs in another thread, as in
    worker.py of lesson 2: meanwhile, pika's thread sends heartbeats.
    """
    return n if n < 2 else fib(n - 1) + fib(n - 2)


parser = argparse.ArgumentParser(description=__doc__)


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
