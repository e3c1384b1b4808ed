"""Prefect's server, closed to web pages: `python -m pipelines.run.server --port PORT`, on 127.0.0.1 only.

Prefect asks for a login if PREFECT_SERVER_API_AUTH_STRING is set, but looks at neither Host nor Origin. Whoever can use its
API can run commands, so that a page of another site, or one whose name is made to point to this machine (DNS rebinding),
must not reach it at all.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

HOST = "127.0.0.1"
NAMES = (HOST, "localhost", "[::1]")
LOGIN_PATH = "/qvgen-login"
# The login is what follows # in the address, which browsers send to no server. Prefect's pages look for it under this key.
LOGIN_PAGE = b"""<!doctype html><title>Prefect</title><script>
localStorage.setItem("prefect-password", btoa(decodeURIComponent(location.hash.slice(1))));
location.replace("/");
</script>"""
HEADERS = [(b"x-frame-options", b"DENY"), (b"content-security-policy", b"frame-ancestors 'none'")]  # no page may frame it


def origins(port: int) -> list[str]:
    """The addresses under which a browser on this machine opens the server's own pages."""
    return [f"http://{name}:{port}" for name in NAMES]


class OwnPages:
    """ASGI middleware: refuses (403) each request, or WebSocket, for another host, or from a page of another origin."""

    def __init__(self, app: Any, port: int) -> None:
        self.app = app
        self.origins = {origin.encode() for origin in origins(port)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        hosts = [b"http://" + value for name, value in scope["headers"] if name == b"host"]
        pages = [value for name, value in scope["headers"] if name == b"origin"]
        if len(hosts) != 1 or not self.origins.issuperset(hosts + pages):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await _reply(send, 403, b"text/plain", b"This server answers to its own pages and programs only.")
        elif scope["type"] == "http" and scope["path"] == LOGIN_PATH:
            await _reply(send, 200, b"text/html", LOGIN_PAGE)
        else:
            await self.app(scope, receive, _unframed(send))


async def _reply(send: Any, status: int, kind: bytes, body: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _unframed(send: Any) -> Any:
    async def add(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message.get("headers", ()), *HEADERS]}
        await send(message)

    return add


def serve(port: int) -> None:
    """Until stopped. Raises ValueError without PREFECT_SERVER_API_AUTH_STRING."""
    if not os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        raise ValueError("PREFECT_SERVER_API_AUTH_STRING, the login, is not set: start the server with `qvgen ui`")
    os.environ["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join(origins(port))
    os.environ["PREFECT_SERVER_UI_API_URL"] = f"http://{HOST}:{port}/api"  # else PREFECT_API_URL, whosever that is
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import PREFECT_SERVER_LOGGING_LEVEL

    app = OwnPages(create_app(final=True), port)
    level = PREFECT_SERVER_LOGGING_LEVEL.value().lower()
    uvicorn.run(app, host=HOST, port=port, log_level=level, proxy_headers=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefect's server on 127.0.0.1, for programs and pages of this machine.")
    parser.add_argument("--port", type=int, required=True)
    serve(parser.parse_args().port)


if __name__ == "__main__":
    main()
