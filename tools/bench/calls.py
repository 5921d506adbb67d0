"""Call fib(N) again and again, with the class FibonacciRpcClient as it is in the lesson."""

import argparse

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


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("n", type=int)
parser.add_argument("count", type=int)
parser.add_argument("--in-flight", type=int, default=1)
parser.add_argument("--queue-per-call", action="store_true")
options = parser.parse_args()

rpc_client.IN_FLIGHT = options.in_flight
with (QueuePerCall if options.queue_per_call else rpc_client.FibonacciRpcClient)() as client:
    client.call(options.n)  # the servers are there
    print(" [.] Begin", flush=True)
    if options.in_flight == 1:
        for _ in range(options.count):
            client.call(options.n)
    else:
        client.call_many([options.n] * options.count, timeout=100)
    print(" [.] End", flush=True)
