"""Send tasks to the web server from many clients at the same time, and count the answers."""

import argparse
import http.client
import json
import signal
import statistics
import threading
import time
from collections import Counter

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main():
    options = parser.parse_args()
    answers = []  # pairs: the status of an answer, and how many seconds it took
    end = time.monotonic() + options.seconds
    clients = [
        threading.Thread(target=run_client, args=(options.port, end, answers))
        for _ in range(options.clients)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    for status, count in sorted(Counter(status for status, _ in answers).items()):
        print(f" [x] {status}: {count}")
    rate = len(answers) / options.seconds
    median = statistics.median(seconds for _status, seconds in answers)
    print(f" [x] {rate:.0f} per second, half of them within {1000 * median:.0f} ms")


def run_client(port, end, answers):
    """Send one task after the other, on one connection as long as the server keeps it open."""
    server = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    while time.monotonic() < end:
        begin = time.monotonic()
        try:
            server.request("POST", "/tasks", json.dumps({"task": "from load.py"}))
            answer = server.getresponse()
            answer.read()
            status = str(answer.status)
        except (OSError, http.client.HTTPException):
            server.close()  # the next request opens a new connection
            status = "no answer"
        answers.append((status, time.monotonic() - begin))
        if status != "202":
            time.sleep(0.1)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--clients", type=int, default=50)
parser.add_argument("--seconds", type=int, default=5)

if __name__ == "__main__":
    main()
