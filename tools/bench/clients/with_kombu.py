"""kombu: publish COUNT, or work PREFETCH."""

import os
import sys

from kombu import Connection, Queue


def publish(connection, count):
    producer = connection.Producer()
    print(" [.] Begin", flush=True)
    for i in range(count):
        producer.publish(
            b"task %05d" % i, routing_key="task_queue", delivery_mode=2, mandatory=True
        )
    print(" [.] End", flush=True)


def work(connection, prefetch):
    queue = Queue("task_queue", durable=True)
    consumer = connection.Consumer(queue, prefetch_count=prefetch, on_message=on_task)
    with consumer:
        while True:
            connection.drain_events()


def on_task(message):
    print(f" [x] Received '{bytes(message.body).decode()}'", flush=True)
    print(" [x] Done", flush=True)
    message.ack()


confirmed = {"confirm_publish": True}
with Connection(os.environ["AMQP_URL"], transport_options=confirmed) as connection:
    {"publish": publish, "work": work}[sys.argv[1]](connection, int(sys.argv[2]))
