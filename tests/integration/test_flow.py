"""The Prefect flow around a real DVC project, with a real Prefect server, a real schedule and real kills."""

from __future__ import annotations

import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.commands.results import markdown_table
from tests.support import toy_project
from tests.support.toy_project import PATIENCE, processes_in, run, start, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.slow]

without_ray = find_spec("prefect_ray") is None
ray = pytest.param("ray", marks=pytest.mark.skipif(without_ray, reason="not installed: pip install prefect-ray==0.6.0"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return toy_project.make(tmp_path)


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


def results(project: Path, parent: str) -> dict[str, str]:
    """What an execution's page in MLflow has in the folder results."""
    folder = Path(MlflowClient(f"sqlite:///{project / 'mlflow.db'}").download_artifacts(parent, "results"))
    return {path.name: path.read_text() for path in folder.iterdir()}


def flow(project: Path, prefect_server: dict[str, str]) -> subprocess.Popen[str]:
    return toy_project.start_flow(project, **prefect_server)


def test_flow_and_dvc_repro_leave_the_same_record(project: Path, prefect_server: dict[str, str]) -> None:
    output, _ = flow(project, prefect_server).communicate(timeout=PATIENCE)
    assert output.count("'state': 'Completed'") == 4, output
    output, _ = flow(project, prefect_server).communicate(timeout=PATIENCE)
    assert output.count("'state': 'Cached'") == 4, output
    first, cached = executions(project)
    assert {stage: tags["produced_by"] for stage, tags in cached.items()} == {s: t["id"] for s, t in first.items()}
    assert record(first) == record(cached)
    assert all("prefect.task_run_id" in tags for tags in first.values())
    assert results(project, first["a"]["mlflow.parentRunId"]) == results(project, cached["a"]["mlflow.parentRunId"])
    shown = {"dvc.lock": (project / "dvc.lock").read_text(), "results.md": markdown_table(project) + "\n"}
    assert results(project, first["a"]["mlflow.parentRunId"]) == shown

    (project / "artifacts" / "c" / "value").unlink()
    (project / "dvc.lock").unlink()
    code, output = run(project, "dvc", "repro", "--force", "--no-run-cache")
    assert code == 0, output
    assert record(executions(project)[2]) == record(first)

    # DVC had these outputs before: nothing is computed again.
    (project / "params.yaml").write_text((project / "params.yaml").read_text().replace("seed: 0", "seed: 1"))
    assert flow(project, prefect_server).communicate(timeout=PATIENCE)[0].count("'Completed'") == 4
    (project / "params.yaml").write_text((project / "params.yaml").read_text().replace("seed: 1", "seed: 0"))
    output, _ = flow(project, prefect_server).communicate(timeout=PATIENCE)
    assert output.count("'state': 'RunCache'") == 4, output


def test_a_failure_is_named_and_what_can_run_still_runs(project: Path, prefect_server: dict[str, str]) -> None:
    (project / "ask").write_text("fail b")
    output, _ = flow(project, prefect_server).communicate(timeout=PATIENCE)
    assert "2 of 4 stages failed or lack what they need: b, d" in output
    assert (project / "artifacts" / "c").exists() and not (project / "artifacts" / "b").exists()
    # The numbers in metrics/ are those of another execution.
    assert results(project, executions(project)[0]["a"]["mlflow.parentRunId"]).keys() == {"dvc.lock"}


@pytest.mark.parametrize("runner", ["dask", ray])
def test_a_cluster_leaves_the_same_record_as_threads(tmp_path: Path, prefect_server: dict[str, str], runner: str) -> None:
    """A local one of real worker processes."""
    records = {}
    for kind in ("threads", runner):
        (tmp_path / kind).mkdir()
        project = toy_project.make(tmp_path / kind, {"runner": kind})
        output, _ = flow(project, prefect_server).communicate(timeout=PATIENCE)
        assert output.count("'state': 'Completed'") == 4, output
        (execution,) = executions(project)
        # Each is a commit of its own.
        records[kind] = {s: {k: v for k, v in tags.items() if k != "git.commit"} for s, tags in record(execution).items()}
    assert records[runner] == records["threads"]


@pytest.mark.parametrize("runner", ["threads", "dask", ray])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopping_a_flow_leaves_no_process(
    tmp_path: Path, prefect_server: dict[str, str], how: signal.Signals, runner: str
) -> None:
    project = toy_project.make(tmp_path, {"runner": runner})
    (project / "ask").write_text("hang b")
    process = flow(project, prefect_server)
    wait_until((project / "started").exists)
    process.send_signal(how)
    process.communicate(timeout=PATIENCE)
    seconds = 120 if runner == "ray" else 60  # after a kill Ray's own agents end by themselves, a minute later
    wait_until(lambda: not processes_in(project), lambda: str(processes_in(project)), seconds)
    (project / "ask").write_text("")
    (project / ".dvc/tmp/rwlock").write_text("")  # as DVC leaves it where it is killed at the wrong moment
    output, _ = flow(project, prefect_server).communicate(timeout=PATIENCE)
    assert output.count("'state': 'Completed'") >= 2, output  # b and d at least; DVC's locks are free


def test_a_stage_is_stopped_at_its_deadline(tmp_path: Path, prefect_server: dict[str, str]) -> None:
    project = toy_project.make(tmp_path, {"deadlines": {"a": 8.0}})
    (project / "ask").write_text("hang a")
    output, _ = flow(project, prefect_server).communicate(timeout=PATIENCE)
    assert "stage a took longer than 8 s; raise flow.deadlines.a" in output
    wait_until(lambda: not processes_in(project), lambda: str(processes_in(project)), 60)


def test_the_temporary_server_gets_the_last_lines_of_the_log(project: Path) -> None:
    code, output = run(project, "pipelines.cli", "repro", "a")
    assert code == 0 and "Finished in state" in output, output
    assert "Error logging to API" not in output


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_stopping_qvgen_repro_stops_its_temporary_server_too(project: Path, how: signal.Signals) -> None:
    (project / "ask").write_text("hang a")
    process = start(project, "pipelines.cli", "repro")
    wait_until((project / "started").exists)
    process.send_signal(how)
    output, _ = process.communicate(timeout=PATIENCE)
    assert how == signal.SIGKILL or output.endswith("`qvgen repro` goes on, training from its last checkpoint.\n")
    assert "Traceback" not in output and "Crash" not in output, output
    wait_until(lambda: not processes_in(project), lambda: str(processes_in(project)), 60)
