"""The history of a registered model's aliases, which MLflow itself does not keep.

Every move is a tag of the registered model, promotion.<alias>.<number>-<random> = JSON, written before the alias: a crash in
between leaves the evidence, and the same move done again completes it. MLflow has no transactions: of two hosts that record
a move at once, one withdraws, so numbers may be missing. `client` is an MlflowClient.
"""

from __future__ import annotations

import getpass
import json
import random
import time
import uuid
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

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
    seen: Sequence[Promotion] | None = None,
) -> bool:
    """Record the move, then make it; returns whether there was anything to do. Callers hold a lock,
    in a project that of stages/record/connection.py, which other hosts do not share.

    `seen` are the moves that the caller decided upon. Raises OvertakenError if there are others by now (None: then the last
    one wins), and what MLflow raises.
    """
    while True:
        records = _records(client, name, alias)
        history = [move for _, move in sorted(records.items())]
        if seen is not None and history != list(seen):
            raise OvertakenError(f"{name}: alias {alias} was moved meanwhile")
        recorded = bool(history) and history[-1].version == version
        if recorded and alias_version(client, name, alias) == version:
            return False
        move = Promotion(version, time.time_ns() // 1_000_000, _user(), reason[:LONGEST_REASON], forced, gate)
        if recorded or _record(client, name, alias, move, records.keys()):
            _settle(client, name, alias)
            return True


def _record(client: Any, name: str, alias: str, move: Promotion, known: Set[str]) -> bool:
    """Whether it is the move after those of the tags `known`; if not, nothing of it is left.

    Of two hosts at least one sees the other's record, and whoever sees one withdraws; both may, and both try again.
    """
    # Not how many there are: a host that withdrew may have been counted for the number of one that stayed.
    last = max((int(key.rpartition(".")[2].partition("-")[0]) for key in known), default=0)
    key = f"{PREFIX}{alias}.{last + 1:06d}-{uuid.uuid4().hex[:8]}"
    client.set_registered_model_tag(name, key, json.dumps(asdict(move)))
    if _records(client, name, alias).keys() - known - {key}:
        client.delete_registered_model_tag(name, key)
        if alias_version(client, name, alias) == move.version:  # somebody took this record for the newest
            _settle(client, name, alias)
        time.sleep(random.uniform(0.1, 1))  # so that they do not meet again
        return False
    return True


def _settle(client: Any, name: str, alias: str) -> None:
    """Make the alias that of the newest record. Each host does so after its own last change of records or alias, and looks
    again: one that took a record for the newest just before its host withdrew it sets the alias back."""
    while history := promotions(client, name, alias):
        newest, now_set = history[-1].version, alias_version(client, name, alias)
        if now_set == newest:
            return
        try:
            client.set_registered_model_alias(name, alias, str(newest))
        except Exception:  # of MLflow, which does not expect that two hosts make a new alias at once
            if now_set is not None or alias_version(client, name, alias) is None:
                raise


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user database
        return "unknown"
