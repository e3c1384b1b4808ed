"""`qvgen ui`: MLflow and Prefect in the browser, both on 127.0.0.1, until Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pipelines.run.checkout import environment
from pipelines.run.health import fetch
from pipelines.run.prefect_home import SERVER_LOGIN, answers, server_login, use_prefect
from pipelines.run.server import LOGIN_PATH, origins
from stages.record.connection import EXPERIMENT, public_uri, tracking_uri

HOST = "127.0.0.1"
PATIENCE = 180  # seconds until a server must answer; on a quiet machine it takes ten


@dataclass(frozen=True)
class Server:
    """A server: whether it answers; if not, the command and variables that start it."""

    answers: Callable[[], bool]
    command: list[str]
    variables: dict[str, str]


TRAINING = "?workflowType=machine_learning"


def show(root: Path, mlflow_port: int, prefect_port: int, browser: bool) -> int:
    """Start what does not run yet, print both addresses, wait, and stop what was started. Raises ValueError if nothing is
    recorded yet, if a port is taken by something else, if a server does not come up, or if MLFLOW_TRACKING_URI names one that
    does not answer: a server elsewhere is only shown.
    """
    store = tracking_uri(root)
    if store.startswith("sqlite") and not Path(store.partition("?")[0].removeprefix("sqlite:///")).is_file():
        raise ValueError("no runs are recorded yet: run `make repro` first")
    elsewhere = store.startswith("http")
    mlflow = store.rstrip("/") if elsewhere else f"http://{HOST}:{mlflow_port}"
    if elsewhere and not _answers(f"{mlflow}/health"):
        raise ValueError(f"MLFLOW_TRACKING_URI is {public_uri(mlflow, root)}, which does not answer: start it, or unset it")
    use_prefect(root)
    login = server_login(root)
    prefect = f"http://{HOST}:{prefect_port}"
    python = [sys.executable, "-m"]
    servers = {
        prefect: Server(
            lambda: answers(f"{prefect}/api", 3, login),
            [*python, "pipelines.run.server", "--port", str(prefect_port)],
            {SERVER_LOGIN: login},
        )
    }
    if not elsewhere:
        own = [origin.removeprefix("http://") for origin in origins(mlflow_port)]
        servers[mlflow] = Server(
            lambda: _answers(f"{mlflow}/health"),
            [*python, "mlflow", "ui", "--host", HOST, "--port", str(mlflow_port), "--workers", "1"],
            {
                # Not as an argument: everybody on this machine can read those, and the store's address may hold a password.
                "MLFLOW_BACKEND_STORE_URI": store,
                # Its own default takes 10.example.com, or any port, for this machine.
                "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(own),
                "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins(mlflow_port)),
            },
        )
    started: list[subprocess.Popen[bytes]] = []
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: told.append(received))
    try:
        for address, server in servers.items():
            if not server.answers():
                started.append(_start(root, address, server))
        for address, server in servers.items():
            _wait(root, address, server, started, told)
        if not told:
            link = _experiment(mlflow, public_uri(mlflow, root))
            stops = ("nothing: both ran already", "what was started", "both")[len(started)]
            print(f"MLflow:  {link}\nPrefect: {prefect}{_login(prefect, login)}\nCtrl-C stops {stops}.", flush=True)
            if browser:
                with suppress(webbrowser.Error):
                    webbrowser.open(link)
        while not told:
            if ended := [p for p in started if p.poll() is not None]:
                raise ValueError(f"a server ended with exit code {ended[0].returncode}; see {root / '.qvgen/logs/ui.log'}")
            time.sleep(0.3)
    finally:
        _stop(started)
    return 0


def _experiment(mlflow: str, shown: str) -> str:
    """The page of the experiment that stages report to, among models in training: without being told, MLflow opens what it has
    for language models, whatever the experiment's kind. Before the first run, the start page."""
    reply = fetch(f"{mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name={EXPERIMENT}", 5)
    try:
        return f"{shown}/#/experiments/{json.loads(reply or '')['experiment']['experiment_id']}{TRAINING}"
    except (ValueError, KeyError, TypeError):
        return shown


def _login(prefect: str, login: str) -> str:
    """What opens Prefect's pages without asking: behind #, which a browser keeps to itself. None of it is for a server that
    was not started by us."""
    return f"{LOGIN_PATH}#{quote(login)}" if _answers(f"{prefect}{LOGIN_PATH}") else ""


def _start(root: Path, address: str, server: Server) -> subprocess.Popen[bytes]:
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            what = "something else, perhaps a server of another project"
            raise ValueError(f"port {port} is taken by {what}: stop it, or choose another (`qvgen ui --help`)")
    log = root / ".qvgen" / "logs" / "ui.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return subprocess.Popen(
            server.command,
            cwd=root,
            env=environment(root) | server.variables,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _wait(root: Path, address: str, server: Server, started: list[subprocess.Popen[bytes]], told: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not told and not server.answers():
        if time.monotonic() > deadline or any(p.poll() is not None for p in started):
            raise ValueError(f"{address} does not answer; see {root / '.qvgen/logs/ui.log'}")
        time.sleep(0.3)


def _answers(address: str) -> bool:
    return fetch(address, 3) is not None


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
