"""faststream: publish COUNT, or work PREFETCH."""

import asyncio
import os
import sys

from faststream import AckPolicy
from faststream.rabbit import Channel, RabbitBroker, RabbitMessage, RabbitQueue

QUEUE = RabbitQueue("task_queue", durable=True)


async def publish(count):
    async with RabbitBroker(os.environ["AMQP_URL"], logger=None) as broker:
        print(" [.] Begin", flush=True)
        for i in range(count):
            await broker.publish(b"task %05d" % i, QUEUE, persist=True, mandatory=True)
        print(" [.] End", flush=True)


async def work(prefetch):
    broker = RabbitBroker(
        os.environ["AMQP_URL"], logger=None, default_channel=Channel(prefetch_count=prefetch)
    )

    @broker.subscriber(QUEUE, ack_policy=AckPolicy.NACK_ON_ERROR)
    async def on_task(message: RabbitMessage):
        print(f" [x] Received '{message.body.decode()}'", flush=True)
        print(" [x] Done", flush=True)

    await broker.start()
    await asyncio.Future()


asyncio.run({"publish": publish, "work": work}[sys.argv[1]](int(sys.argv[2])))
