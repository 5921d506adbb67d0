"""amqpstorm: publish COUNT, or work PREFETCH."""

import os
import sys

import amqpstorm


def publish(channel, count):
    channel.confirm_deliveries()
    print(" [.] Begin", flush=True)
    for i in range(count):
        channel.basic.publish(
            b"task %05d" % i, "task_queue", properties={"delivery_mode": 2}, mandatory=True
        )
    print(" [.] End", flush=True)


def work(channel, prefetch):
    channel.basic.qos(prefetch)
    channel.basic.consume(on_task, "task_queue")
    channel.start_consuming()


def on_task(message):
    print(f" [x] Received '{message.body}'", flush=True)
    print(" [x] Done", flush=True)
    message.ack()


connection = amqpstorm.UriConnection(os.environ["AMQP_URL"])
{"publish": publish, "work": work}[sys.argv[1]](connection.channel(), int(sys.argv[2]))
