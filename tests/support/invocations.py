"""Requests as MLflow's scoring protocol has them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """`content`: what JSON says, or of a refusal the text."""

    status: int
    content: Any
    headers: Any


def ask(address: str, prompt: Any = "a red digit three", seed: int = 1, **params: Any) -> Answer:
    """A video of a prompt."""
    body = {"dataframe_split": {"columns": ["prompt", "seed"], "data": [[prompt, seed]]}, "params": params}
    return post(address, json.dumps(body).encode())


def post(address: str, body: bytes, kind: str = "application/json", **headers: str) -> Answer:
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": kind, **headers})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return Answer(answer.status, json.loads(answer.read()), answer.headers)
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode(), error.headers)


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=20) as answer:
        return answer.read().decode()
