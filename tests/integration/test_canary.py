"""`qvgen canary` without a project, on a real registry: the registered videos made again, compared, and logged."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from pipelines.audit.lineage import Lineage
from pipelines.audit.uploaded import canary_check
from qvgen.evaluation.quality.canary import make_canary
from qvgen.hub.artifacts import CANARY, CANARY_RECORD, CANARY_TAG
from qvgen.sampling.settings import read_settings
from qvgen.sampling.video import write_video
from tests.support.fresh_venv import Installed
from tests.support.packed_model import make_packed
from tests.support.registered import outside, packed_wish, register

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def registered(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """Version 1 of "canary" with two videos of its own; version 2 with one that it did not make; version 3, whose record was
    changed; version 4 as 2, and the record names another kernel."""
    client, folder = MlflowClient(mlflow_server), tmp_path_factory.mktemp("packed")
    make_packed(folder)
    known, record = folder / CANARY, folder / CANARY / CANARY_RECORD
    known.mkdir()
    make_canary(folder / "packed", known, ["a", "b"], [1, 2], read_settings(folder / "packed"))
    model = packed_wish(folder, "canary")
    for number in (1, 3, 2, 4):
        content = json.loads(record.read_text())
        if number == 2:
            size = content["settings"]
            write_video(known / "0.mp4", torch.full((3, size["frames"], size["height"], size["width"]), -1.0), size["fps"])
            content["sha256"][0] = hashlib.sha256((known / "0.mp4").read_bytes()).hexdigest()
        if number == 4:
            content["made_with"]["kernel"] = "another"
        record.write_text(json.dumps(content))
        sha256 = "0" if number == 3 else hashlib.sha256(record.read_bytes()).hexdigest()
        wish = {"name": f"canary-{number}", "identity": f"canary-{number}", "tags": model["tags"] | {CANARY_TAG: sha256}}
        client.log_artifacts(register(client, model | wish).run_id, str(known), CANARY)
    return client


def run(fresh: Installed, folder: Path, server: str, version: int) -> tuple[int, str]:
    variables = outside(fresh.venv, folder, server)
    command = [str(fresh.venv / "bin" / "qvgen"), "canary", f"models:/canary-{version}/1"]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def audited(client: Any, version: int) -> Any:
    return canary_check(Lineage(client.get_model_version(f"canary-{version}", "1"), None, []))


def test_as_registered(fresh: Installed, registered: Any, mlflow_server: str, tmp_path: Path) -> None:
    assert "nobody has asked yet" in audited(registered, 1).detail
    code, output = run(fresh, tmp_path, mlflow_server, 1)
    assert code == 0 and "as registered: all 2 videos bit-equal" in output, output
    check = audited(registered, 1)
    assert check.ok and check.detail.startswith(f"{platform.node()} 20") and "all 2 videos bit-equal" in check.detail


@pytest.mark.parametrize(("version", "limit"), [(2, "must be bit-equal"), (4, "must be at least 25 dB; other kernel")])
def test_another_model_is_noticed(
    fresh: Installed, registered: Any, mlflow_server: str, tmp_path: Path, version: int, limit: str
) -> None:
    code, output = run(fresh, tmp_path, mlflow_server, version)
    assert code == 1 and "NOT as registered: 1 of 2 videos bit-equal" in output and limit in output, output
    check = audited(registered, version)
    assert check.state == "FAIL" and "NOT as registered" in check.detail


def test_a_changed_record_proves_nothing(fresh: Installed, registered: Any, mlflow_server: str, tmp_path: Path) -> None:
    code, output = run(fresh, tmp_path, mlflow_server, 3)
    assert code == 1 and "is not what was registered: nothing to compare with" in output
