"""`qvgen lineage sync` with a real `mlflow server` that is killed while a stage reports to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support import toy_project
from tests.support.toy_project import PATIENCE, run, start, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.slow]

POINTS = 500
STAGE = f"""
import time
from stages.runtime.run import stage_main

def run(stage):
    with stage.outputs("artifacts/a") as folder:
        for step in range({POINTS}):
            stage.log_metrics({{"loss": 1 / (step + 1)}}, step=step)
            if step == 250:
                (stage.root / "started").touch()
            time.sleep(0.02)
        (folder / "value").write_text("a")

stage_main("a", run)
"""


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    store = f"sqlite:///{folder / 'server.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", str(folder / "files")]
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)

    def up() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as reply:
                return reply.status == 200
        except OSError:
            return False

    wait_until(up, (folder / "log").read_text)
    return process


def loss_points(uri: str) -> list[tuple[int, float]]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("qvgen")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], "tags.`dvc.stage` = 'a' and attributes.status = 'FINISHED'")
    assert found.data.metrics["system/process_memory_megabytes"] > 10
    return [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, "loss")]


def test_a_server_killed_in_the_middle_loses_no_point(tmp_path: Path) -> None:
    project, folder = tmp_path / "project", tmp_path / "server"
    project.mkdir()
    folder.mkdir()
    toy_project.make(project)
    (project / "stages" / "a.py").write_text(STAGE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    server = start_server(folder, port)
    try:
        process = start(project, "dvc", "repro", "a", MLFLOW_TRACKING_URI=uri)
        wait_until((project / "started").exists)
        time.sleep(1)
        os.killpg(server.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        assert output.count("does not answer") == 1, output

        code, output = run(project, "pipelines.cli", "lineage", "sync", "--json", MLFLOW_TRACKING_URI=uri)
        assert code == 1 and len(json.loads(output.splitlines()[-1])["unsent"]) == 2, output
        server = start_server(folder, port)
        for sent in (2, 0):  # the stage and its execution
            code, output = run(project, "pipelines.cli", "lineage", "sync", "--json", MLFLOW_TRACKING_URI=uri)
            assert code == 0 and len(json.loads(output.splitlines()[-1])["sent"]) == sent, output
            assert loss_points(uri) == [(step, 1 / (step + 1)) for step in range(POINTS)]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
