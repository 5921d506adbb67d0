"""pika's BlockingConnection, as a first program uses it: publish COUNT [confirmed] [transient]."""

import os
import sys

import pika

count, options = int(sys.argv[2]), sys.argv[3:]
mode = pika.DeliveryMode.Transient if "transient" in options else pika.DeliveryMode.Persistent
properties = pika.BasicProperties(delivery_mode=mode)

channel = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"])).channel()
if "confirmed" in options:
    channel.confirm_delivery()
print(" [.] Begin", flush=True)
for i in range(count):
    channel.basic_publish("", "task_queue", b"task %05d" % i, properties, mandatory=True)
channel.close()  # RabbitMQ answers this when it has read all that came before
print(" [.] End", flush=True)
