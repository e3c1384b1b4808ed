"""The Prefect flow around a real DVC project, with a real Prefect server, a real schedule and real kills."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy_project
from mlflow import MlflowClient
from toy_project import run, start

from pipelines.prefect_home import answers

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PATIENCE = 300  # seconds, on a busy machine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
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
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: answers(variables["PREFECT_API_URL"]), (home / "log").read_text)
            yield variables
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return toy_project.make(tmp_path)


def wait_until(condition: Callable[[], Any], explain: Callable[[], str] = lambda: "", seconds: float = PATIENCE) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"it did not happen in time: {explain()[-3000:]}"
        time.sleep(0.2)
    return found


def executions(project: Path) -> list[dict[str, Any]]:
    """Stage -> tags of its run, of every execution in MLflow, oldest first."""
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("qvgen")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    parents = [r.info.run_id for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = {p: [r for r in runs if r.data.tags.get("mlflow.parentRunId") == p] for p in parents}
    return [{r.data.tags["dvc.stage"]: r.data.tags | {"id": r.info.run_id} for r in children[p]} for p in parents]


def record(execution: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What must not depend on who started the stages."""
    return {
        stage: {key: value for key, value in tags.items() if key.startswith(("dvc.", "git."))}
        for stage, tags in execution.items()
    }


def processes_in(project: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(project) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def flow(project: Path, server: dict[str, str], code: str = "run_pipeline(Path('.').resolve())") -> subprocess.Popen[str]:
    script = project / ".qvgen" / "flow_script.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"from pathlib import Path\nfrom pipelines.flow import run_pipeline\nprint('ROWS', {code})\n")
    variables = server | {"PYTHONPATH": os.pathsep.join([str(project), str(toy_project.ROOT)])}
    return start(project, "runpy", str(script), **variables)


def test_flow_and_dvc_repro_leave_the_same_record(project: Path, server: dict[str, str]) -> None:
    output, _ = flow(project, server).communicate(timeout=PATIENCE)
    assert output.count("'state': 'Completed'") == 4, output
    output, _ = flow(project, server).communicate(timeout=PATIENCE)
    assert output.count("'state': 'Cached'") == 4, output
    first, cached = executions(project)
    assert {stage: tags["produced_by"] for stage, tags in cached.items()} == {s: t["id"] for s, t in first.items()}
    assert record(first) == record(cached)
    assert all("prefect.task_run_id" in tags for tags in first.values())

    (project / "artifacts" / "c" / "value").unlink()
    (project / "dvc.lock").unlink()
    code, output = run(project, "dvc", "repro", "--force", "--no-run-cache")
    assert code == 0, output
    assert record(executions(project)[2]) == record(first)

    # DVC had these outputs before: nothing is computed again.
    (project / "params.yaml").write_text((project / "params.yaml").read_text().replace("seed: 0", "seed: 1"))
    assert flow(project, server).communicate(timeout=PATIENCE)[0].count("'Completed'") == 4
    (project / "params.yaml").write_text((project / "params.yaml").read_text().replace("seed: 1", "seed: 0"))
    output, _ = flow(project, server).communicate(timeout=PATIENCE)
    assert output.count("'state': 'RunCache'") == 4, output


def test_a_failure_is_named_and_what_can_run_still_runs(project: Path, server: dict[str, str]) -> None:
    (project / "ask").write_text("fail b")
    output, _ = flow(project, server).communicate(timeout=PATIENCE)
    assert "2 of 4 stages failed or lack what they need: b, d" in output
    assert (project / "artifacts" / "c").exists() and not (project / "artifacts" / "b").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopping_a_flow_leaves_no_process(project: Path, server: dict[str, str], how: signal.Signals) -> None:
    (project / "ask").write_text("hang b")
    process = flow(project, server)
    wait_until((project / "started").exists)
    process.send_signal(how)
    process.communicate(timeout=PATIENCE)
    wait_until(lambda: not processes_in(project), lambda: str(processes_in(project)), 60)
    (project / "ask").write_text("")
    output, _ = flow(project, server).communicate(timeout=PATIENCE)
    assert output.count("'state': 'Completed'") >= 2, output  # b and d at least; DVC's locks are free


def test_a_stage_is_stopped_at_its_deadline(tmp_path: Path, server: dict[str, str]) -> None:
    project = toy_project.make(tmp_path, {"deadlines": {"a": 8.0}})
    (project / "ask").write_text("hang a")
    output, _ = flow(project, server).communicate(timeout=PATIENCE)
    assert "stage a took longer than 8 s; raise flow.deadlines.a" in output
    wait_until(lambda: not processes_in(project), lambda: str(processes_in(project)), 60)
