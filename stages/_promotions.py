"""The history of a registered model's aliases, which MLflow itself does not keep.

Every move is a tag of the registered model, promotion.<alias>.<number> = JSON, written before the alias: a crash in between
leaves the evidence, and the same move done again completes it. `client` is an MlflowClient.
"""

from __future__ import annotations

import getpass
import json
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


def promotions(client: Any, name: str, alias: str) -> list[Promotion]:
    """Recorded moves of an alias, oldest first. Raises what MLflow raises, and ValueError for a record that is damaged."""
    prefix = f"{PREFIX}{alias}."
    tags = client.get_registered_model(name).tags
    found = []
    for key in sorted(key for key in tags if key.startswith(prefix)):
        try:
            found.append(Promotion(**json.loads(tags[key])))
        except (TypeError, ValueError):
            raise ValueError(f"tag {key} of registered model {name} is not a promotion record: {tags[key]!r:.200}") from None
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
) -> bool:
    """Record the move, then make it; returns whether there was anything to do. Callers hold the lock of
    stages/_tracking.py. Raises what MLflow raises."""
    history = promotions(client, name, alias)
    recorded = bool(history) and history[-1].version == version
    if recorded and alias_version(client, name, alias) == version:
        return False
    if not recorded:
        record = Promotion(version, now(), _user(), reason[:LONGEST_REASON], forced, gate)
        client.set_registered_model_tag(name, f"{PREFIX}{alias}.{len(history) + 1:06d}", json.dumps(asdict(record)))
    client.set_registered_model_alias(name, alias, str(version))
    return True


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user database
        return "unknown"
