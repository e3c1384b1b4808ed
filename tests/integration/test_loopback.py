"""With a dead proxy in the environment and no `no_proxy`, every client still reaches servers of this machine."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import toy_project

pytestmark = pytest.mark.integration

DEAD = "http://127.0.0.1:9"
PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), DEAD)
CLIENTS = {
    "health": "from pipelines.run.health import fetch; assert fetch(address, 5) == b'yes'",
    "httpx": "import httpx; assert httpx.get(address).text == 'yes'",  # of Prefect
    "requests": "import requests; assert requests.get(address).text == 'yes'",  # of MLflow
}


class Yes(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"yes")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Yes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("given", ["", "internal.example.com"])
def test_loopback_goes_through_no_proxy(address: str, client: str, given: str, tmp_path: Path) -> None:
    start = "import os; from stages.record.connection import spare_loopback; " * (client != "health")
    spare = "spare_loopback(os.environ); " * (client != "health")
    script = f"{start}{spare}address = {address!r}; {CLIENTS[client]}"
    kept = {name: value for name, value in toy_project.environment().items() if "proxy" not in name.lower()}
    variables = kept | PROXIES | ({"no_proxy": given} if given else {})
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_proxy_is_still_asked_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.record.connection import spare_loopback

    variables = {"no_proxy": "internal.example.com"}
    spare_loopback(variables)
    assert variables["no_proxy"] == "internal.example.com,127.0.0.1,localhost,::1"
    spare_loopback(variables)
    assert variables["no_proxy"].count("127.0.0.1") == 1
