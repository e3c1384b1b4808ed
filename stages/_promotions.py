"""The history of a registered model's aliases, which MLflow itself does not keep.

Every move is a tag of the registered model, promotion.<alias>.<number>-<random> = JSON, written before the alias: a crash in
between leaves the evidence, and the same move done again completes it. MLflow has no transactions: of two hosts that record
the same number at once, one withdraws. `client` is an MlflowClient.
"""

from __future__ import annotations

import getpass
import json
import random
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Any

from stages._journal import now

PREFIX = "promotion."
LONGEST_REASON = 1000  # characters; MLflow refuses tags of more than 5000


@dataclass(frozen=True)
class Promotion:
    """One move of an alias. `time` in milliseconds since 1970; `gate`: rule -> value, limit, ok."""

    version: int
    time: int
    by: str
    reason: str
    forced: bool = False
    gate: dict[str, Any] | None = None


class OvertakenError(RuntimeError):
    """Another host moved the alias since the caller looked: what was decided may be wrong now."""


def promotions(client: Any, name: str, alias: str) -> list[Promotion]:
    """Recorded moves of an alias, oldest first. Raises what MLflow raises, and ValueError for a record that is damaged."""
    return [move for _, move in sorted(_records(client, name, alias).items())]


def _records(client: Any, name: str, alias: str) -> dict[str, Promotion]:
    """By tag."""
    prefix, found = f"{PREFIX}{alias}.", dict[str, Promotion]()
    for key, value in client.get_registered_model(name).tags.items():
        if key.startswith(prefix):
            try:
                found[key] = Promotion(**json.loads(value))
            except (TypeError, ValueError):
                raise ValueError(f"tag {key} of registered model {name} is not a promotion record: {value!r:.200}") from None
    return found


def _number(key: str) -> str:
    return key.partition("-")[0]


def alias_version(client: Any, name: str, alias: str) -> int | None:
    """The version that an alias names now; None if there is no such alias."""
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else int(version)


def move_alias(
    client: Any,
    name: str,
    alias: str,
    version: int,
    *,
    reason: str,
    forced: bool = False,
    gate: dict[str, Any] | None = None,
    seen: int | None = None,
) -> bool:
    """Record the move, then make it; returns whether there was anything to do. Callers hold the lock of
    stages/_connection.py, which other hosts do not share.

    `seen` is the number of moves that the caller decided upon. Raises OvertakenError if there are more by now (None: then the
    last one wins), and what MLflow raises.
    """
    while True:
        history = promotions(client, name, alias)
        if seen is not None and len(history) != seen:
            raise OvertakenError(f"{name}: alias {alias} was moved {len(history) - seen} times meanwhile")
        recorded = bool(history) and history[-1].version == version
        if recorded and alias_version(client, name, alias) == version:
            return False
        move = Promotion(version, now(), _user(), reason[:LONGEST_REASON], forced, gate)
        if recorded or _record(client, name, alias, len(history) + 1, move):
            client.set_registered_model_alias(name, alias, str(version))
            newest = promotions(client, name, alias)[-1].version
            if newest != version:  # recorded since, and its alias perhaps set before ours
                client.set_registered_model_alias(name, alias, str(newest))
            return True


def _record(client: Any, name: str, alias: str, number: int, move: Promotion) -> bool:
    """Whether it is the move of that number; if not, nothing of it is left.

    Of two hosts at least one sees the other's record, and whoever sees one withdraws; both may, and both try again.
    """
    key = f"{PREFIX}{alias}.{number:06d}-{uuid.uuid4().hex[:8]}"
    client.set_registered_model_tag(name, key, json.dumps(asdict(move)))
    if any(_number(other) == _number(key) for other in _records(client, name, alias).keys() - {key}):
        client.delete_registered_model_tag(name, key)
        time.sleep(random.uniform(0.1, 1))  # so that they do not meet again
        return False
    return True


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user database
        return "unknown"
