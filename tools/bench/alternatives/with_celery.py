"""celery: publish COUNT, or work PREFETCH."""

import os
import sys

from celery import Celery

app = Celery("with_celery", broker=os.environ["AMQP_URL"], set_as_current=True)
app.conf.update(
    task_default_queue="task_queue",
    task_default_exchange="",
    task_default_routing_key="task_queue",
    task_acks_late=True,
    task_ignore_result=True,
    broker_transport_options={"confirm_publish": True},
    worker_prefetch_multiplier=int(sys.argv[2]) if sys.argv[1] == "work" else 1,
    worker_redirect_stdouts=False,
    worker_enable_remote_control=False,  # its queues are not durable, and RabbitMQ 4.3 refuses them
    worker_detect_quorum_queues=False,
)


@app.task
def on_task(text):
    print(f" [x] Received '{text}'", flush=True)
    print(" [x] Done", flush=True)


if sys.argv[1] == "publish":
    print(" [.] Begin", flush=True)
    for i in range(int(sys.argv[2])):
        on_task.apply_async([f"task {i:05}"], mandatory=True)
    print(" [.] End", flush=True)
else:
    worker = ["worker", "--concurrency", "1", "--without-gossip", "--without-mingle"]
    app.worker_main([*worker, "--without-heartbeat", "--loglevel", "CRITICAL"])
