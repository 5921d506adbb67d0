"""Publish with pika's BlockingConnection, as a first program would: for comparison."""

import argparse
import os

import pika

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("count", type=int)
parser.add_argument("--size", type=int, default=10, help="of each message, in bytes")
parser.add_argument("--exchange", default="", help="the default one, if it is not given")
parser.add_argument("--confirm", action="store_true", help="wait for a confirm after each one")
parser.add_argument("--transient", action="store_true")
options = parser.parse_args()

channel = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"])).channel()
if options.confirm:
    channel.confirm_delivery()
mode = pika.DeliveryMode.Transient if options.transient else pika.DeliveryMode.Persistent
print(" [.] Begin", flush=True)
for _ in range(options.count):
    channel.basic_publish(
        exchange=options.exchange,
        routing_key="task_queue",
        body=b"x" * options.size,
        properties=pika.BasicProperties(delivery_mode=mode),
        mandatory=options.confirm,
    )
channel.close()  # RabbitMQ answers this when it has read all that came before
print(" [.] End", flush=True)
