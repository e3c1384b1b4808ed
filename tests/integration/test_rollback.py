"""`qvgen rollback` without a project, on a real registry."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from qvgen.hub.promotions import Promotion, alias_version, move_alias, promotions
from qvgen.hub.rollback import ROLLED_BACK, former_champion
from tests.support.fresh_venv import Installed
from tests.support.registered import make_wish, outside, register

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def content(number: int) -> dict[str, bytes]:
    return {"model_index.json": b"{}", "transformer/weights.safetensors": bytes([number]) * 1000}


@pytest.fixture
def client(mlflow_server: str, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """Three versions of a model of the test's own name, champion one after the other."""
    client = MlflowClient(mlflow_server)
    for number in (1, 2, 3):
        register(client, make_wish(tmp_path / str(number), request.node.name, content(number)))
        move_alias(client, request.node.name, "champion", number, reason="passed the gate")
    return client


def run(fresh: Installed, folder: Path, server: str, *arguments: str) -> tuple[int, str]:
    (folder / "empty").mkdir(exist_ok=True)
    variables = outside(fresh.venv, folder, server)
    command = [str(fresh.venv / "bin" / "qvgen"), "rollback", *arguments]
    done = subprocess.run(command, cwd=folder / "empty", env=variables, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_back_and_further_back(fresh: Installed, client: Any, mlflow_server: str, tmp_path: Path) -> None:
    name = "test_back_and_further_back"
    code, output = run(fresh, tmp_path, mlflow_server, name, "--reason", "it flickers")
    assert code == 0 and f"{name} version 2 is champion again, instead of version 3" in output, output
    move = promotions(client, name, "champion")[-1]
    assert (move.version, move.reason, move.gate) == (2, "it flickers", {ROLLED_BACK: [3, "", True]})
    code, output = run(fresh, tmp_path, mlflow_server, name, "--reason", "so did that one")
    assert code == 0 and alias_version(client, name, "champion") == 1, output
    code, output = run(fresh, tmp_path, mlflow_server, name, "--reason", "and that")
    assert code == 1 and "there is nothing to go back to" in output
    code, output = run(fresh, tmp_path, mlflow_server, name, "--to", "9", "--reason", "x")
    assert code == 1 and "models:/test_back_and_further_back/9" in output


def test_nothing_moves_without_the_bytes_or_a_reason(
    fresh: Installed, client: Any, mlflow_server: str, tmp_path: Path
) -> None:
    name = "test_nothing_moves_without_the_bytes_or_a_reason"
    bad = tmp_path / "weights.safetensors"
    bad.write_bytes(b"other")
    source = client.get_model_version(name, "2").source.removeprefix("models:/")
    client.log_model_artifact(source, str(bad), "artifacts/packed/transformer")
    code, output = run(fresh, tmp_path, mlflow_server, name, "--reason", "x")
    assert code == 1 and "nowhere to be had" in output and "has other bytes" in output
    code, output = run(fresh, tmp_path, mlflow_server, name, "--reason", " ")
    assert code == 1 and "--reason" in output
    assert alias_version(client, name, "champion") == 3 and len(promotions(client, name, "champion")) == 3
    assert run(fresh, tmp_path, mlflow_server, name, "--to", "1", "--reason", "the one before it is damaged")[0] == 0


def test_the_former_champion() -> None:
    def history(*moves: int) -> list[Promotion]:
        """A negative number is a rollback."""
        return [Promotion(abs(v), 0, "", "", gate={ROLLED_BACK: [0, "", True]} if v < 0 else None) for v in moves]

    assert former_champion(history(1)) is None
    assert former_champion(history(1, 2)) == 1
    assert former_champion(history(1, 2, 3, -2)) == 1
    assert former_champion(history(1, 2, 3, -1)) is None
    assert former_champion(history(1, 2, -1, 4)) == 1
    assert former_champion(history(1, 2, -1, 2, 4, -2)) == 1
