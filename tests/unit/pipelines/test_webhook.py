"""QVGEN_WEBHOOK: who is told of a failure, and that nobody else learns the address, whose path is a password."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.run import retrain
from pipelines.run.retrain import WEBHOOK

SECRET = "T0-B0-abcdef"
STATE: Any = SimpleNamespace(name="Failed", message="stage qat failed")
RUN: Any = SimpleNamespace(name="calm-otter")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(retrain, "get_run_logger", lambda: logging.getLogger("webhook"))  # there is no flow run here
    return caplog


@pytest.fixture
def chat() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A real server: its address with a secret, and what it was told. It refuses what is not under that secret."""
    told: list[dict[str, str]] = []

    class Chat(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == f"/services/{SECRET}":
                told.append(json.loads(content))
            self.send_response(200 if self.path == f"/services/{SECRET}" else 403)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/services/{SECRET}", told
    server.shutdown()


def test_a_failure_is_told(
    chat: tuple[str, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    address, told = chat
    monkeypatch.setenv(WEBHOOK, address)
    retrain.notify(None, RUN, STATE)
    assert told == [{"text": "qvgen retraining calm-otter: Failed: stage qat failed"}] and not said.records


@pytest.mark.parametrize(
    "bad",
    [
        f"http://127.0.0.1:1/services/{SECRET}",
        f"no address {SECRET}",
        f"http://[{SECRET}",
        f"gopher://127.0.0.1/{SECRET}",
        f"http://127.0.0.1:99999/{SECRET}",
    ],
)
def test_a_bad_address_is_a_warning_without_it(
    bad: str, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(WEBHOOK, bad)
    retrain.notify(None, RUN, STATE)
    (record,) = said.records
    assert WEBHOOK in record.getMessage() and SECRET not in said.text and record.exc_info is None


def test_a_refusal_is_a_warning_with_its_number(
    chat: tuple[str, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(WEBHOOK, chat[0] + "-wrong")
    retrain.notify(None, RUN, STATE)
    assert "was not told: 403" in said.text and SECRET not in said.text
