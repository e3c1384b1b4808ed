"""`qvgen ui`: MLflow and Prefect in the browser, both on 127.0.0.1, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser
from contextlib import suppress
from pathlib import Path

from pipelines.checkout import environment
from pipelines.prefect_home import use_prefect

HOST = "127.0.0.1"
PATIENCE = 180  # seconds until a server must answer; on a quiet machine it takes ten


def show(root: Path, mlflow_port: int, prefect_port: int, browser: bool) -> int:
    """Start what does not run yet, print both addresses, wait, and stop what was started. Raises ValueError if nothing is
    recorded yet, if a port is taken by something else, or if a server does not come up.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not given.startswith("http") and not (root / "mlflow.db").is_file():
        raise ValueError("no runs are recorded yet: run `make repro` first")
    use_prefect(root)
    mlflow = given.rstrip("/") if given.startswith("http") else f"http://{HOST}:{mlflow_port}"
    prefect = f"http://{HOST}:{prefect_port}"
    python = [sys.executable, "-m"]
    store = ["--backend-store-uri", given or f"sqlite:///{root / 'mlflow.db'}"]
    commands = {
        (mlflow, "/health"): [*python, "mlflow", "ui", "--host", HOST, "--port", str(mlflow_port), "--workers", "1", *store],
        (prefect, "/api/health"): [*python, "prefect", "server", "start", "--host", HOST, "--port", str(prefect_port)],
    }
    started: list[subprocess.Popen[bytes]] = []
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: told.append(received))
    try:
        for (address, health), command in commands.items():
            if not _answers(address + health):
                started.append(_start(root, address, command))
        for address, health in commands:
            _wait(root, address, health, started, told)
        if not told:
            print(
                f"MLflow:  {mlflow}\nPrefect: {prefect}\nCtrl-C stops {'both' if len(started) == 2 else 'what was started'}."
            )
            sys.stdout.flush()
            if browser:
                with suppress(webbrowser.Error):
                    webbrowser.open(mlflow)
        while not told:
            if ended := [p for p in started if p.poll() is not None]:
                raise ValueError(f"a server ended with exit code {ended[0].returncode}; see {root / '.qvgen/logs/ui.log'}")
            time.sleep(0.3)
    finally:
        _stop(started)
    return 0


def _start(root: Path, address: str, command: list[str]) -> subprocess.Popen[bytes]:
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise ValueError(f"port {port} is taken by something else: stop it, or choose another (`qvgen ui --help`)")
    log = root / ".qvgen" / "logs" / "ui.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return subprocess.Popen(
            command,
            cwd=root,
            env=environment(root),
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _wait(root: Path, address: str, health: str, started: list[subprocess.Popen[bytes]], told: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not told and not _answers(address + health):
        if time.monotonic() > deadline or any(p.poll() is not None for p in started):
            raise ValueError(f"{address} does not answer; see {root / '.qvgen/logs/ui.log'}")
        time.sleep(0.3)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as reply:
            return reply.status == 200
    except (OSError, ValueError):
        return False


def _stop(started: list[subprocess.Popen[bytes]]) -> None:
    """End each server with all its processes: it has a session of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + 15
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
