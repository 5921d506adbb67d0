"""The same web server as server.py, with asyncio. It needs aiohttp."""

import argparse
import asyncio
import json
import logging
import sys

from aiohttp import web
from publisher import Publisher, PublishError


async def post_task(request):
    try:
        task = (await request.json())["task"].encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return answer(400, error='A task looks like this: {"task": "Hello..."}')
    try:
        confirm = request.app[PUBLISHER].publish(task)
        if options.blocking:
            message_id = confirm.result()  # wrong: meanwhile, the whole server waits
        else:
            message_id = await asyncio.wrap_future(confirm)  # meanwhile, others are served
    except PublishError as error:
        return answer(503, error=str(error))
    return answer(202, id=message_id)


async def get_health(request):
    if request.app[PUBLISHER].is_ready():
        return answer(200, rabbitmq="reachable")
    return answer(503, rabbitmq="not reachable")


def answer(status, **content):
    headers = {"Retry-After": "5"} if status == 503 else {}
    text = json.dumps(content) + "\n"
    return web.Response(text=text, status=status, headers=headers, content_type="application/json")


async def close(app):
    await asyncio.to_thread(app[PUBLISHER].close)


PUBLISHER = web.AppKey("publisher", Publisher)


def main():
    app = web.Application(client_max_size=1_000_000)  # bytes of a request
    app[PUBLISHER] = Publisher("task_queue")
    app[PUBLISHER].is_ready()  # connects now, not at the first request
    app.add_routes([web.post("/tasks", post_task), web.get("/health", get_health)])
    app.on_cleanup.append(close)
    waiting = f" [*] Waiting at http://127.0.0.1:{options.port}/tasks. To exit press CTRL+C"
    web.run_app(
        app,
        host="127.0.0.1",
        port=options.port,
        print=lambda _: print(waiting),  # aiohttp calls this when it has opened the port
        shutdown_timeout=10,  # how many seconds requests may take when the server is stopped
    )


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--blocking", action="store_true", help="wait for confirms in the wrong way")

if __name__ == "__main__":
    options = parser.parse_args()
    try:
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)
        logging.basicConfig(format=" [!] %(message)s")
        logging.getLogger("pika").propagate = False  # publisher.py says what went wrong
        main()
    except (OSError, ValueError, OverflowError) as error:  # the port is in use, for example
        sys.exit(f" [!] {error}")
