"""aio-pika: publish COUNT [WINDOW], or work PREFETCH."""

import asyncio
import os
import sys

import aio_pika


async def publish(channel, count, window=1):
    room = asyncio.Semaphore(window)

    async def send(body):
        async with room:
            message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
            await channel.default_exchange.publish(message, "task_queue", mandatory=True)

    print(" [.] Begin", flush=True)
    await asyncio.gather(*(send(b"task %05d" % i) for i in range(count)))
    print(" [.] End", flush=True)


async def work(channel, prefetch):
    await channel.set_qos(prefetch_count=prefetch)
    queue = await channel.declare_queue("task_queue", durable=True)
    await queue.consume(on_task)
    await asyncio.Future()


async def on_task(message):
    async with message.process():
        print(f" [x] Received '{message.body.decode()}'", flush=True)
        print(" [x] Done", flush=True)


async def main():
    connection = await aio_pika.connect(os.environ["AMQP_URL"])
    async with connection:
        do = {"publish": publish, "work": work}[sys.argv[1]]
        await do(await connection.channel(), *map(int, sys.argv[2:]))


asyncio.run(main())
