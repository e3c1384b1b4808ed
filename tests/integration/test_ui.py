"""`qvgen ui` starts both servers for real, shows where they are, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import signal
import socket
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support import toy_project
from tests.support.toy_project import processes_in, run, start, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return toy_project.make(tmp_path)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_server_elsewhere_that_is_down_is_named_and_none_is_started(project: Path) -> None:
    code, output = run(project, "pipelines.cli", "ui", "--no-browser", MLFLOW_TRACKING_URI="http://user:secret@127.0.0.1:9")
    assert code == 1 and "http://127.0.0.1:9, which does not answer" in output
    assert "secret" not in output and not processes_in(project)


def test_ui_starts_both_servers_and_leaves_nothing(project: Path) -> None:
    code, output = run(project, "pipelines.cli", "ui", "--no-browser")
    assert code == 1 and "no runs are recorded yet" in output
    assert run(project, "dvc", "repro", "a")[0] == 0
    (project / "mlflow.db").rename(project / "other.db")  # MLflow's own default is mlflow.db in the current folder
    code, output = run(project, "pipelines.cli", "ui", "--no-browser")
    assert code == 1 and "no runs are recorded yet" in output
    ports = free_port(), free_port()
    options = ["--no-browser", "--mlflow-port", str(ports[0]), "--prefect-port", str(ports[1])]
    # The second: a server that the user has named for flows must not be what the page of this one asks.
    variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{project}/other.db", "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    process = start(project, "pipelines.cli", "ui", *options, **variables)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        experiment = rf"http://127.0.0.1:{ports[0]}/#/experiments/[1-9]\d*\?workflowType=machine_learning"
        assert re.fullmatch(rf"MLflow:  {experiment}\n", lines[0]), lines
        login = (project / ".qvgen" / "prefect.secret").read_text().strip()
        assert lines[1] == f"Prefect: http://127.0.0.1:{ports[1]}/qvgen-login#{quote(login)}\n"
        for address in (f"http://127.0.0.1:{ports[0]}/", f"http://127.0.0.1:{ports[1]}/api/health"):
            with urllib.request.urlopen(address, timeout=30) as reply:
                assert reply.status == 200
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[1]}/ui-settings", timeout=30) as reply:
            assert json.load(reply)["api_url"] == f"http://127.0.0.1:{ports[1]}/api"
        second = start(project, "pipelines.cli", "ui", *options, **variables)
        assert second.stdout is not None
        assert [second.stdout.readline() for _ in range(3)] == [*lines, "Ctrl-C stops nothing: both ran already.\n"]
        second.send_signal(signal.SIGINT)
        second.communicate(timeout=60)
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/health", timeout=30) as reply:
            assert reply.status == 200
    finally:
        process.terminate()
        process.communicate(timeout=60)
    wait_until(lambda: not processes_in(project), lambda: str(processes_in(project)), 60)

    with socket.create_server(("127.0.0.1", ports[0])):
        code, output = run(project, "pipelines.cli", "ui", *options, **variables)
    assert code == 1 and f"port {ports[0]} is taken" in output
