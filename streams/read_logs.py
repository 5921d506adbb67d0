"""Print the lines of the stream 'log_stream', from any place in it."""

import argparse
import os
import re
import signal
import sys
import time
from contextlib import suppress
from datetime import datetime
from functools import partial

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl+C and kill end the script at once
        signal.signal(number, lambda *_: os._exit(0))

import pika
from pika.exceptions import AMQPConnectionError, AMQPError


def main(channel, options):
    channel.queue_declare("log_stream", durable=True, arguments={"x-queue-type": "stream"})
    if options.file is not None and os.path.getsize(options.file) > 0:
        options.start = int(os.pread(options.file, 20, 0))
    if options.start in ("last", "next"):
        last = last_offset()
        if options.start == "next" or last == -1:
            go_on_at(last + 1, options)  # a number is still right if we connect again
    if options.until_end:
        options.end = last_offset() if options.end is None else options.end
        if options.end == -1 or (isinstance(options.start, int) and options.start > options.end):
            os._exit(0)  # there is nothing to read

    # RabbitMQ sends this many lines before it waits for acknowledgements. A stream needs a limit.
    channel.basic_qos(prefetch_count=options.prefetch)
    channel.basic_consume(
        queue="log_stream",
        on_message_callback=partial(on_line, options=options),
        arguments={"x-stream-offset": options.start},
    )
    options.printed = []  # the delivery tags of the lines that we have not acknowledged
    if not options.until_end:
        print(" [*] Waiting for logs. To exit press CTRL+C", file=sys.stderr)
    elif not isinstance(options.start, int):
        take_first_lines(channel)
        if not isinstance(options.start, int):
            os._exit(0)  # no line is as young as that
    acknowledge_every_second(channel, options)


def on_line(channel, method, properties, body, options):
    offset = offset_of(properties)
    text = body.decode(errors="surrogateescape")
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if options.store_first:  # this is wrong: see the lesson
        go_on_at(offset + 1, options)
        time.sleep(options.pause)
        print(f" [x] {offset}: {text}")
    else:
        print(f" [x] {offset}: {text}")
        if options.pause:
            time.sleep(options.pause)
        go_on_at(offset + 1, options)
    if options.until_end and offset >= options.end:
        os._exit(0)
    options.printed.append(method.delivery_tag)
    if len(options.printed) >= options.prefetch / 2:
        acknowledge(channel, options)


def offset_of(properties):
    return properties.headers["x-stream-offset"]


def acknowledge(channel, options):
    """Let RabbitMQ send more lines. One call for many lines is much faster than one for each."""
    if options.printed:
        channel.basic_ack(options.printed[-1], multiple=True)
        options.printed.clear()


def acknowledge_every_second(channel, options):
    """RabbitMQ closes a channel on which a line is unacknowledged for half an hour."""
    acknowledge(channel, options)
    channel.connection.call_later(1, partial(acknowledge_every_second, channel, options))


def go_on_at(offset, options):
    """Keep the offset for the next connection, and in the file for the next start."""
    options.start = offset
    if options.file is not None:
        os.pwrite(options.file, b"%19d\n" % offset, 0)  # always 20 bytes: all of them, or none


def take_first_lines(channel):
    """Wait until RabbitMQ has sent the first lines, or has none for us."""
    channel.connection.process_data_events(time_limit=2)
    channel.queue_declare("log_stream", passive=True)  # when it answers, all of them have come
    channel.connection.process_data_events(time_limit=0)


def last_offset():
    """Return the offset of the last line that is there now, or -1 if there is none."""
    offsets = [-1]
    connection = connect()
    channel = connection.channel()
    channel.basic_qos(prefetch_count=65535)
    channel.basic_consume(
        queue="log_stream",
        on_message_callback=lambda *delivery: offsets.append(offset_of(delivery[2])),
        arguments={"x-stream-offset": "last"},  # RabbitMQ sends the last line, or the last few
    )
    take_first_lines(channel)
    with suppress(AMQPError):  # RabbitMQ 3 does not let pika give back what has come since then
        connection.close()
    return offsets[-1]


def place(text):
    """first, last, next, an offset, a time, or how long ago: what RabbitMQ understands."""
    if re.fullmatch("first|last|next|[0-9]+[YMDhms]", text):
        return text
    if text.isdecimal() and int(text) < 2**63:
        return int(text)
    when = datetime.fromisoformat(text)
    if not 1970 < when.year < 9999:
        raise ValueError
    return when.astimezone()  # if there is no time zone in the text, it is the local one


def offset_file(name):
    """Open the file in which a reader with a name keeps where to go on."""
    file = os.open(f"{name}.offset", os.O_RDWR | os.O_CREAT, 0o666)
    int(os.pread(file, 20, 0) or 0)  # it is an error if something else is in this file
    return file


def prefetch_count(text):
    """Return the number. AMQP has 16 bits for it."""
    if not 0 <= int(text) <= 65535:
        raise ValueError
    return int(text)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--from",
    dest="start",
    type=place,
    default="next",
    metavar="PLACE",
    help="first, last, next (the default), an offset, a time (2030-12-31T23:59), or an age (1h)",
)
parser.add_argument(
    "--name",
    dest="file",
    type=offset_file,
    metavar="NAME",
    help="keep the next offset in the file NAME.offset, and go on there at the next start",
)
parser.add_argument("--until-end", action="store_true", help="end after the lines that exist now")
parser.add_argument(
    "--prefetch",
    type=prefetch_count,
    default=1000,
    metavar="N",
    help="how many lines RabbitMQ sends before it waits for acknowledgements",
)
parser.add_argument("--store-first", action="store_true", help="keep the offset before printing")
parser.add_argument("--pause", type=float, default=0, metavar="SECONDS", help="after each line")
parser.set_defaults(end=None)


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
