"""Real `dvc exp run`, in a copy of the project and from a queue: the record is that of the project itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support import toy_project
from tests.support.toy_project import run

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_experiments_leave_the_record_of_a_run(tmp_path: Path) -> None:
    project = toy_project.make(tmp_path)
    code, output = run(project, "dvc", "exp", "run", "--temp", "--name", "one", "-S", "seed=1")
    assert code == 0, output
    code, output = run(project, "dvc", "exp", "run", "--queue", "--name", "two", "-S", "seed=2")
    assert code == 0, output
    code, output = run(project, "dvc", "exp", "run", "--run-all")
    assert code == 0, output

    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("qvgen")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert [run.data.tags["dvc.exp_name"] for run in parents] == ["one", "two"]
    for seed, parent in enumerate(parents, start=1):
        children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert {run.data.tags["dvc.stage"] for run in children} == set("abcd")
        assert {run.data.params["seed"] for run in children} == {str(seed)}
        assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
        assert all(any(key.startswith("dvc.out.") for key in run.data.tags) for run in children)
        # What was not committed is what the experiment changed.
        difference = client.download_artifacts(parent.info.run_id, "uncommitted.diff", str(tmp_path))
        assert f"+seed: {seed}" in Path(difference).read_text()
    assert not (project / "artifacts").exists(), "an experiment of its own folder leaves this one alone"
