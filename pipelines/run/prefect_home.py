"""Where Prefect keeps its things and which server it talks to. Use it before anything imports prefect."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from pipelines.run.health import accepts, fetch
from stages.record.connection import public_uri, spare_loopback

LOCAL_API = "http://127.0.0.1:4200/api"
LOGIN = "PREFECT_API_AUTH_STRING"  # that clients send
SERVER_LOGIN = "PREFECT_SERVER_API_AUTH_STRING"  # that a server asks for
SECRET = Path(".qvgen", "prefect.secret")
# What a person reads while it runs: when, which stage, and what it says.
_LINES = {"FLOW_RUN": "%(asctime)s  %(message)s", "TASK_RUN": "%(asctime)s  %(task_run_name)s: %(message)s"}
STARTUP_SECONDS = 180  # of a temporary server; ten on a quiet machine


def use_prefect(root: Path) -> str | None:
    """Set Prefect's environment and return the address of the server that is there: PREFECT_API_URL, else that on
    127.0.0.1:4200 if it accepts this project's login, else None. Prefect's files are in .qvgen/prefect.

    Clients and child processes find the login as PREFECT_API_AUTH_STRING, for a server on this machine only.
    """
    spare_loopback(os.environ)
    os.environ.setdefault("PREFECT_HOME", str(root / ".qvgen" / "prefect"))
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)  # its server dies without
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")  # a server that Prefect starts asks for no login
    for kind, words in _LINES.items():
        os.environ.setdefault(f"PREFECT_LOGGING_FORMATTERS_STANDARD_{kind}_FMT", words)
    api = os.environ.get("PREFECT_API_URL")
    if api is None and answers(LOCAL_API, login=os.environ.get(LOGIN) or server_login(root)):
        api = os.environ["PREFECT_API_URL"] = LOCAL_API
    if api is not None and is_local(api):
        os.environ.setdefault(LOGIN, server_login(root))
    return api


def is_local(api: str) -> bool:
    """Whether the address is of this machine: the project's login goes to no other."""
    return urlsplit(api).hostname in ("127.0.0.1", "localhost", "::1")


def server_login(root: Path) -> str:
    """`user:password` of the servers that this project starts: PREFECT_SERVER_API_AUTH_STRING, else .qvgen/prefect.secret,
    which is made on first use and which only its owner may read. Raises ValueError if others may, too."""
    if given := os.environ.get(SERVER_LOGIN):
        return given
    file = root / SECRET
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent) as draft:  # of mode 0600
            draft.write(f"qvgen:{secrets.token_urlsafe(32)}\n")
            draft.flush()
            with suppress(FileExistsError):  # another process was first
                os.link(draft.name, file)
    if file.stat().st_mode & 0o077:
        raise ValueError(f"{file} can be read by others: delete it and start the servers again, then it is made anew")
    return file.read_text().strip()


@contextmanager
def some_server(root: Path) -> Iterator[None]:
    """The server that is there, or a temporary one for the time of the block. Raises ValueError if it does not start, or
    if nobody answers at PREFECT_API_URL.

    Prefect can start one by itself, which outlives a flow that is killed; this one is guarded (pipelines/run/guard.py).
    """
    if api := use_prefect(root):
        if not _reachable(api):
            where = public_uri(api, root)
            raise ValueError(f"PREFECT_API_URL is {where}, where nobody answers: start that server, or unset the variable")
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = root / ".qvgen" / "logs" / "prefect.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    login = server_login(root)
    serve = [sys.executable, "-m", "pipelines.run.server", "--port", str(port)]
    with log.open("w") as file:
        command = [sys.executable, "-m", "pipelines.run.guard", "--", *serve]
        variables = os.environ | {SERVER_LOGIN: login}
        guard = subprocess.Popen(command, env=variables, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    try:
        api = f"http://127.0.0.1:{port}/api"
        deadline = time.monotonic() + STARTUP_SECONDS
        while not answers(api, login=login):
            if guard.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"a temporary Prefect server did not start; see {log}, or run `dvc repro`, which needs none")
            time.sleep(0.3)
        os.environ |= {"PREFECT_API_URL": api, LOGIN: login}
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


def _reachable(api: str) -> bool:
    """Whether anything listens there. Behind a proxy nobody can say without asking it."""
    parts = urlsplit(api)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = parts.hostname or ""
    if getproxies() and not proxy_bypass(host):
        return True
    return answers(api, 5) or accepts(host, port, 5)


def answers(api: str, seconds: float = 1.0, login: str | None = None) -> bool:
    """Whether a Prefect server answers at this address and accepts `login`, PREFECT_API_AUTH_STRING if none is given."""
    parts = urlsplit(f"{api.rstrip('/')}/admin/version")  # not /health, which asks for no login
    login = login or os.environ.get(LOGIN)
    if login and "@" not in parts.netloc:
        parts = parts._replace(netloc=f"{quote(login)}@{parts.netloc}")
    return fetch(urlunsplit(parts), seconds) is not None
