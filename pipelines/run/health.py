"""Does a server answer? In a bounded time, whatever it does, and without showing its password."""

from __future__ import annotations

import base64
import http.client
import os
import socket
import threading
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from stages.record.connection import spare_loopback

Answer = TypeVar("Answer")


def fetch(address: str, seconds: float) -> bytes | None:
    """The body of a GET of the http(s) address, if status 200 comes within `seconds`, all in all; else None. Never raises.

    `user:password@` in the address is sent as basic authentication, as MLflow's client does.
    """

    spare_loopback(os.environ)

    def ask() -> bytes | None:
        parts = urlsplit(address)
        login, _, host = parts.netloc.rpartition("@")
        request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)))
        if login:
            request.add_header("Authorization", "Basic " + base64.b64encode(unquote(login).encode()).decode())
        with urllib.request.urlopen(request, timeout=seconds) as reply:
            return reply.read() if reply.status == 200 else None

    return _within(seconds, ask)


def status(address: str, seconds: float, body: bytes, headers: Mapping[str, str]) -> int | None:
    """The status of the answer to a POST within `seconds`; None without one. Never raises; uses no proxy."""

    def ask() -> int:
        parts = urlsplit(address)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        with closing(kind(parts.hostname or "", parts.port, timeout=seconds)) as connection:
            connection.request("POST", parts.path, body, {"Content-Type": "application/json"} | dict(headers))
            return connection.getresponse().status

    return _within(seconds, ask)


def accepts(host: str, port: int, seconds: float) -> bool:
    """Whether a connection to the port succeeds within `seconds`. Never raises."""

    def connect() -> bool:
        socket.create_connection((host, port), seconds).close()
        return True

    return bool(_within(seconds, connect))


def _within(seconds: float, ask: Callable[[], Answer]) -> Answer | None:
    """In a thread, because timeouts of sockets start again with every byte and address, and leave out the look-up of names."""
    found: list = []

    def run() -> None:
        try:
            found.append(ask())
        except (OSError, ValueError, http.client.HTTPException):  # the last: what answers does not speak HTTP
            found.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
