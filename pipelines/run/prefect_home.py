"""Where Prefect keeps its things and which server it talks to. Use it before anything imports prefect."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.run.health import fetch

LOCAL_API = "http://127.0.0.1:4200/api"
STARTUP_SECONDS = 180  # of a temporary server; ten on a quiet machine


def use_prefect(root: Path) -> str | None:
    """Set Prefect's environment and return the address of the server that is there: PREFECT_API_URL, else that on
    127.0.0.1:4200 if it answers, else None. Prefect's files are in .qvgen/prefect."""
    os.environ.setdefault("PREFECT_HOME", str(root / ".qvgen" / "prefect"))
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)  # its server dies without
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    if "PREFECT_API_URL" not in os.environ and answers(LOCAL_API):
        os.environ["PREFECT_API_URL"] = LOCAL_API
    return os.environ.get("PREFECT_API_URL")


@contextmanager
def some_server(root: Path) -> Iterator[None]:
    """The server that is there, or a temporary one for the time of the block. Raises ValueError if it does not start.

    Prefect can start one by itself, which outlives a flow that is killed; this one is guarded (pipelines/run/guard.py).
    """
    if use_prefect(root):
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = root / ".qvgen" / "logs" / "prefect.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    serve = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        command = [sys.executable, "-m", "pipelines.run.guard", "--", *serve]
        guard = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    try:
        api = f"http://127.0.0.1:{port}/api"
        deadline = time.monotonic() + STARTUP_SECONDS
        while not answers(api):
            if guard.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"a temporary Prefect server did not start; see {log}, or run `dvc repro`, which needs none")
            time.sleep(0.3)
        os.environ["PREFECT_API_URL"] = api
        yield
    finally:
        _send_last_logs()
        os.environ.pop("PREFECT_API_URL", None)
        guard.send_signal(signal.SIGTERM)
        guard.wait()


def _send_last_logs() -> None:
    """A thread of Prefect sends them in batches, the last one when this process ends: too late for a temporary server."""
    if "prefect" in sys.modules:
        from prefect.logging.handlers import APILogWorker

        APILogWorker.drain_all(timeout=5)


def answers(api: str, seconds: float = 1.0) -> bool:
    """Whether a Prefect server answers at this address."""
    return fetch(f"{api.rstrip('/')}/health", seconds) is not None
