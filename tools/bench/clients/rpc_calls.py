"""Calls of fib(5) with the class of lesson 6: COUNT IN_FLIGHT [queue-per-call]."""

import sys

from rpc import rpc_client


class QueuePerCall(rpc_client.FibonacciRpcClient):
    """The same, but each call makes a callback queue of its own, and deletes it."""

    def call(self, n: int, timeout: float = 10) -> int:
        self.channel.queue_delete(queue=self.callback_queue)
        self.callback_queue = self.channel.queue_declare(queue="", exclusive=True).method.queue
        self.channel.basic_consume(
            queue=self.callback_queue, on_message_callback=self.on_answer, auto_ack=True
        )
        return int(super().call(n, timeout))


count, rpc_client.IN_FLIGHT = map(int, sys.argv[1:3])
with (QueuePerCall if sys.argv[3:] else rpc_client.FibonacciRpcClient)() as client:
    client.call(5)  # the servers are there
    print(" [.] Begin", flush=True)
    if rpc_client.IN_FLIGHT > 1:
        client.call_many([5] * count, timeout=100)
    else:
        for _ in range(count):
            client.call(5)
    print(" [.] End", flush=True)
