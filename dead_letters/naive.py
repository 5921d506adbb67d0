"""Requeue a failed task at once, which does not work."""

import argparse

from worker import connect

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("type", choices=["classic", "quorum"], help="the type of the queue")
options = parser.parse_args()

channel = connect().channel()
channel.queue_declare("naive", durable=True, arguments={"x-queue-type": options.type})
for task in ("poison", "good"):
    channel.basic_publish("", "naive", task)

channel.basic_qos(prefetch_count=1)
delivered = []
for method, _properties, body in channel.consume("naive", inactivity_timeout=2):
    if body is None or len(delivered) == 100:  # None: nothing came for two seconds
        break
    delivered.append(body)
    if body == b"poison":
        channel.basic_reject(method.delivery_tag, requeue=True)
    else:
        channel.basic_ack(method.delivery_tag)

print("poison:", delivered.count(b"poison"), "good:", delivered.count(b"good"))
channel.queue_delete("naive")
