"""`qvgen rollback`: the alias champion goes back to a version that was champion before, recorded as a promotion is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from qvgen.cache import cache_folder
from qvgen.hub.promotions import OvertakenError, Promotion, alias_version, move_alias, promotions
from qvgen.hub.reference import Reference
from qvgen.hub.resolve import fetch
from qvgen.hub.tracking import find_tracking, open_client, read_version

CHAMPION = "champion"
ROLLED_BACK = "rollback from version"  # in a record's gate, which did not decide


@dataclass(frozen=True)
class Rollback:
    """What became of it; `record`: the newest move of the alias."""

    name: str
    version: int
    champion: int | None  # before
    moved: bool
    message: str
    record: dict[str, Any]


def rollback(
    name: str, to: int | None = None, *, reason: str, uri: str | None = None, alone: AbstractContextManager[Any] | None = None
) -> Rollback:
    """Make a former champion champion again: version `to`, by default the one before the champion of now. Its files are
    fetched and hashed first, so that servers that follow the alias get a model that is there.

    Only a version that was champion can be rolled back to; any other has to pass the gate (`qvgen promote`). A move that was
    cut short is completed. `alone`: a lock that other moves of this host take too. Raises ValueError without a reason, without
    such a version, if no place has its files, and if another host moved the alias meanwhile.
    """
    if not reason.strip():
        raise ValueError('a rollback needs --reason "TEXT": it is recorded in the registry, for whoever asks later')
    uri = uri or find_tracking()
    client = open_client(uri)
    wanted = read_version(client, Reference(name, alias=CHAMPION) if to is None else Reference(name, version=to))
    with alone or _own_lock():
        history, champion = promotions(client, name, CHAMPION), alias_version(client, name, CHAMPION)
        version = former_champion(history) if to is None else wanted.version
        if version is None:
            raise ValueError(f"{name} has had no other champion than version {champion}: there is nothing to go back to")
        if version not in {move.version for move in history}:
            known = ", ".join(map(str, dict.fromkeys(move.version for move in history))) or "none"
            raise ValueError(f"version {version} of {name} never was champion (those that were: {known}); see `qvgen promote`")
        if history[-1].version == version:
            moved = move_alias(client, name, CHAMPION, version, reason="")
            message = f"{name} version {version} is champion " + ("again, as recorded" if moved else "already")
            return Rollback(name, version, champion, moved, message, asdict(history[-1]))
        fetch(read_version(client, Reference(name, version=version)), uri)
        gate = {ROLLED_BACK: [history[-1].version, "", True]}
        try:
            move_alias(client, name, CHAMPION, version, reason=reason.strip(), gate=gate, seen=history)
        except OvertakenError as error:
            raise ValueError(f"{error}, by another host: see what it did, then try again") from None
        record = asdict(promotions(client, name, CHAMPION)[-1])
        message = f"{name} version {version} is champion again, instead of version {history[-1].version}"
        return Rollback(name, version, champion, True, message, record)


def former_champion(history: Sequence[Promotion]) -> int | None:
    """The champion before that of now. What was rolled back from does not count: two rollbacks go back by two."""
    stack: list[int] = []
    for move in history:
        if move.gate and ROLLED_BACK in move.gate and move.version in stack:
            del stack[len(stack) - stack[::-1].index(move.version) :]
        else:
            stack.append(move.version)
    return next((version for version in reversed(stack) if version != stack[-1]), None)


def _own_lock() -> AbstractContextManager[Any]:
    from filelock import FileLock

    cache_folder().mkdir(parents=True, exist_ok=True)
    return FileLock(cache_folder() / "aliases.lock")
