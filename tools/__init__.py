"""What plays, starts, records and measures. No script needs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT = 15  # seconds; what is waited for comes in far less, even on a busy machine


def environment(amqp_url: str | None = None, **more: str) -> dict[str, str]:
    """Return the environment of a reader's terminal. Nothing in it flushes a script's output."""
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONUNBUFFERED", "AMQP_URL")}
    plain["PATH"] = f"{Path(sys.executable).parent}:{plain['PATH']}"  # `python` is this one
    plain |= {"PYTHONUTF8": "1"} | more
    return plain | ({} if amqp_url is None else {"AMQP_URL": amqp_url})
