"""Requeue a failed task at once, which does not work. Usage: python naive.py classic|quorum"""

import sys

from worker import connect

channel = connect().channel()
channel.queue_declare("naive", durable=True, arguments={"x-queue-type": sys.argv[1]})
for task in ("poison", "good"):
    channel.basic_publish("", "naive", task)

channel.basic_qos(prefetch_count=1)
delivered = []
for method, _properties, body in channel.consume("naive", inactivity_timeout=2):
    if body is None or len(delivered) == 100:
        break
    delivered.append(body)
    if body == b"poison":
        channel.basic_reject(method.delivery_tag, requeue=True)
    else:
        channel.basic_ack(method.delivery_tag)

print("poison:", delivered.count(b"poison"), "good:", delivered.count(b"good"))
channel.queue_delete("naive")
