"""A real Prefect server, as `qvgen ui` starts it, for the tests of flows and schedules; a project that passes the audit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from pipelines.run.prefect_home import answers
from tests.support import audited_project, fresh_venv, services
from tests.support.toy_project import wait_until


@pytest.fixture(scope="session")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose model passes the audit. Tests copy it (audited_project.copy) before they change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return audited_project.make_with_champion(tmp_path_factory.mktemp("champion") / "project")


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables of a running Prefect server whose scheduler looks every 5 seconds."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",
        "PREFECT_API_AUTH_STRING": "qvgen:of-the-tests",
    }
    own = {"PREFECT_SERVER_API_AUTH_STRING": variables["PREFECT_API_AUTH_STRING"]}
    command = [sys.executable, "-m", "pipelines.run.server", "--port", str(port)]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | variables | own, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: answers(variables["PREFECT_API_URL"], login="qvgen:of-the-tests"), (home / "log").read_text)
            yield variables
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real `mlflow server` that keeps files itself, as a team's does. Each test registers names of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    store = f"sqlite:///{folder / 'mlflow.db'}"
    with services.mlflow(folder, store, str(folder / "files"), {}) as address:
        yield address


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> fresh_venv.Installed:
    """The wheel, and an environment with `qvgen[serve]` alone; made once for all of pytest's processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "fresh.lock"):
        return fresh_venv.make(folder / "fresh")
