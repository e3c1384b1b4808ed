"""Who may use the servers that run? They are asked as a web page would ask, and as a stranger on this machine would."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipelines.run.health import fetch, status
from pipelines.run.prefect_home import LOCAL_API
from stages.record.connection import tracking_uri

FOREIGN = "qvgen.invalid"  # a name that nobody can own (RFC 2606)
MLFLOW = "http://127.0.0.1:5000"
# Reading, by POST: browsers treat it as they treat a change, and it changes nothing.
QUESTIONS = {
    "Prefect": ("/flows/filter", b'{"limit": 1}'),
    "MLflow": ("/api/2.0/mlflow/experiments/search", b'{"max_results": 1}'),
}


@dataclass(frozen=True)
class Exposure:
    """Status of the answers of the server at `where` to three requests without a login. 2xx: it did as it was told."""

    kind: str
    where: str
    foreign_page: int  # with the Origin of another site
    foreign_name: int  # with another Host, as after DNS rebinding
    no_login: int

    @property
    def to_web_pages(self) -> bool:
        return any(200 <= code < 300 for code in (self.foreign_page, self.foreign_name))

    @property
    def to_this_machine(self) -> bool:
        return 200 <= self.no_login < 300

    def __str__(self) -> str:
        asked = {
            "a page of another site": self.foreign_page,
            "another host name": self.foreign_name,
            "no login": self.no_login,
        }
        said = (f"{name} {'is answered' if 200 <= code < 300 else 'is refused'} ({code})" for name, code in asked.items())
        return f"{self.kind}: {', '.join(said)}"


def measure(root: Path, seconds: float) -> list[Exposure]:
    """The servers that answer: those that this project would use, and those that it runs, on whatever port."""
    found: dict[str, Exposure] = {}
    for kind, base in _servers(root, seconds):
        parts = urlsplit(base)
        path, body = QUESTIONS[kind]
        # Without the login that the address may hold.
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/") + path).geturl()
        where = urlsplit(url).netloc
        port = f":{parts.port}" if parts.port else ""
        asked = ({"Origin": f"https://{FOREIGN}"}, {"Host": f"{FOREIGN}{port}"}, {})
        codes = [code for headers in asked if (code := status(url, seconds, body, headers)) is not None]
        if where not in found and len(codes) == len(asked):
            found[where] = Exposure(kind, where, *codes)
    return list(found.values())


def _servers(root: Path, seconds: float) -> Iterator[tuple[str, str]]:
    for kind, base in (("Prefect", os.environ.get("PREFECT_API_URL")), ("MLflow", tracking_uri(root))):
        if base and base.startswith("http"):
            yield kind, base
    for base in dict.fromkeys([LOCAL_API.removesuffix("/api"), MLFLOW, *_listening(root)]):
        if fetch(f"{base}/api/health", seconds) == b"true":
            yield "Prefect", f"{base}/api"
        elif fetch(f"{base}/health", seconds) == b"OK":
            yield "MLflow", base


def _listening(root: Path) -> Iterator[str]:
    """Where processes listen whose folder is `root`, as that of each server which we start is."""
    import psutil

    for connection in psutil.net_connections("tcp"):
        if connection.status != psutil.CONN_LISTEN or not connection.pid or not connection.laddr:
            continue
        try:
            ours = psutil.Process(connection.pid).cwd() == str(root.resolve())
        except psutil.Error:
            continue
        if ours:
            ip, port = connection.laddr
            host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(ip, f"[{ip}]" if ":" in ip else ip)
            yield f"http://{host}:{port}"
