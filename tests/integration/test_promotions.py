"""Aliases that several hosts move at once: no record is lost, and nobody wins against a champion he was not held against."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import pipelines.champion.promote as promoting
from pipelines.champion.gate import Rule
from qvgen.hub.promotions import PREFIX, OvertakenError, Promotion, alias_version, move_alias, promotions
from qvgen.params import load_params
from stages.record.connection import connect

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
NAME = "qvgen"
VERSIONS = range(1, 6)
ROUNDS = 10  # without _settle, one of the first six went wrong


class Interrupted:
    """An MLflow client on which, just before the first call of `method`, `meanwhile` happens on another host."""

    def __init__(self, client: Any, method: str, meanwhile: Callable[[], object]) -> None:
        self._client, self._method, self._meanwhile = client, method, [meanwhile]

    def __getattr__(self, name: str) -> Any:
        if name == self._method and self._meanwhile:
            self._meanwhile.pop()()
        return getattr(self._client, name)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A registry with some versions of one model, none of them champion."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client, _ = connect(tmp_path)
    client.create_registered_model(NAME)
    for _ in VERSIONS:
        client.create_model_version(NAME, source=str(tmp_path))
    return client


def champions(client: Any) -> list[int]:
    return [move.version for move in promotions(client, NAME, "champion")]


def test_a_move_that_another_host_overtook_is_refused(client: Any) -> None:
    assert move_alias(client, NAME, "champion", 1, reason="first", seen=[])
    with pytest.raises(OvertakenError, match="moved meanwhile"):
        move_alias(client, NAME, "champion", 2, reason="late", seen=[])
    assert champions(client) == [1] and alias_version(client, NAME, "champion") == 1


@pytest.mark.parametrize("method", ["set_registered_model_tag", "set_registered_model_alias"])
def test_two_hosts_in_the_middle_of_a_move(client: Any, method: str) -> None:
    """The other one moves between this one's look and its record (it withdraws), or between record and alias (it has won)."""
    lost = []

    def other() -> None:
        try:
            move_alias(client, NAME, "champion", 2, reason="other", seen=[])
        except OvertakenError:
            lost.append(2)

    try:
        move_alias(Interrupted(client, method, other), NAME, "champion", 1, reason="this", seen=[])
    except OvertakenError:
        lost.append(1)
    assert lost == ([1] if method == "set_registered_model_tag" else [2])
    (winner,) = {1, 2} - set(lost)
    assert champions(client) == [winner] and alias_version(client, NAME, "champion") == winner


@pytest.mark.parametrize("seen", [None, []], ids=["unjudged", "judged"])
def test_many_hosts_at_once(client: Any, seen: list[Promotion] | None) -> None:
    """Of moves that nobody judged, the last wins and all are kept; of those judged upon no champion, at most one is made."""

    def move(alias: str, version: int, made: list[int]) -> None:
        with suppress(OvertakenError):
            if move_alias(client, NAME, alias, version, reason="r", seen=seen):
                made.append(version)

    for alias in map("champion{}".format, range(ROUNDS)):
        made: list[int] = []
        hosts = [threading.Thread(target=move, args=(alias, version, made), daemon=True) for version in VERSIONS]
        for host in hosts:
            host.start()
        for host in hosts:
            host.join(60)
            assert not host.is_alive(), "still trying"
        history = [move.version for move in promotions(client, NAME, alias)]
        assert sorted(history) == sorted(made)
        assert alias_version(client, NAME, alias) == (history[-1] if history else None)
        assert len(history) <= 1 if seen == [] else sorted(history) == [*VERSIONS]
        tags = client.get_registered_model(NAME).tags
        assert len({tag.partition("-")[0] for tag in tags if tag.startswith(f"{PREFIX}{alias}.")}) == len(history)


def test_as_many_moves_are_not_the_same_moves(client: Any) -> None:
    """The one that was seen has been withdrawn, and another host's stands in its place."""
    record(client, 1, 2)
    seen = promotions(client, NAME, "champion")
    client.delete_registered_model_tag(NAME, f"{PREFIX}champion.000001-0a")
    record(client, 1, 3)
    with pytest.raises(OvertakenError):
        move_alias(client, NAME, "champion", 1, reason="better than version 2", seen=seen)
    assert champions(client) == [3]


@pytest.fixture
def after_a_withdrawal(client: Any) -> Any:
    """Version 1's move came while two other hosts had recorded theirs; it is number 3, and those have withdrawn."""
    record(client, 3, 1)
    client.set_registered_model_alias(NAME, "champion", "1")
    return client


def record(client: Any, number: int, version: int) -> None:
    move = {"version": version, "time": 0, "by": "t", "reason": "r"}
    client.set_registered_model_tag(NAME, f"{PREFIX}champion.{number:06d}-0a", json.dumps(move))


def test_numbers_of_moves_that_were_withdrawn_stop_nobody(after_a_withdrawal: Any) -> None:
    for version in (2, 3, 1):  # by the count of records, the second would have number 3, for ever
        assert move_alias(after_a_withdrawal, NAME, "champion", version, reason="r")
    assert champions(after_a_withdrawal) == [1, 2, 3, 1]


def test_a_move_of_any_number_that_came_meanwhile_is_seen(client: Any) -> None:
    hasty = Interrupted(client, "set_registered_model_tag", lambda: record(client, 3, 2))
    with pytest.raises(OvertakenError):
        move_alias(hasty, NAME, "champion", 1, reason="r", seen=[])
    assert champions(client) == [2]


def test_the_gate_decides_again_if_there_is_another_champion_by_then(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 1 passes as long as there is no champion; version 2 becomes champion while it is held against nobody."""
    rivals: list[str | None] = []

    def judge(client: Any, params: Any, wanted: Any, rival: Any) -> list[Rule]:
        rivals.append(None if rival is None else rival.version)
        if len(rivals) == 1:
            move_alias(client, NAME, "champion", 2, reason="another host")
        return [Rule("against champion", 1.0, ">=", -math.inf if rival is None else 2.0, "")]

    monkeypatch.setattr(promoting, "_judge", judge)
    outcome = promoting.promote(tmp_path, load_params(ROOT / "params.yaml"), NAME, version=1)
    assert [str(rival) for rival in rivals] == ["None", "2"]
    assert not outcome.ok and "version 2 stays champion" in outcome.message
    assert champions(client) == [2] and alias_version(client, NAME, "champion") == 2
