"""Send tasks to the queue 'task_queue' without confirms. Usage: python no_confirms.py NUMBER"""

import os
import sys
import time

import pika

count = int(sys.argv[1])
url = os.getenv("AMQP_URL", "amqp://guest:guest@localhost:5672/%2F")
channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
persistent = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)

begin = time.monotonic()
for number in range(count):
    channel.basic_publish("", "task_queue", b"%d" % number, persistent)
channel.close()  # RabbitMQ answers this when it has read all tasks
print(f" [x] Sent {count} tasks, {count / (time.monotonic() - begin):.0f} per second")
