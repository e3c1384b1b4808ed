"""What docs/team.md describes: MLflow and Prefect on a real PostgreSQL, data and artifacts behind a real S3 API, two hosts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.support import services, toy_project
from tests.support.services import PASSWORD, Postgres
from tests.support.toy_project import PATIENCE, run, start

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@dataclass
class Team:
    """The servers, and a folder for checkouts."""

    postgres: Postgres
    variables: dict[str, str]  # of a host that works with them
    folder: Path

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.variables["MLFLOW_TRACKING_URI"])

    def runs(self, query: str = "") -> list[Any]:
        experiment = self.client.get_experiment_by_name("qvgen")
        assert experiment is not None
        return list(self.client.search_runs([experiment.experiment_id], query, order_by=["attributes.start_time"]))

    def objects(self, prefix: str) -> set[str]:
        import boto3

        listed = boto3.client("s3", endpoint_url=self.variables["AWS_ENDPOINT_URL"]).list_objects_v2(
            Bucket="qvgen", Prefix=prefix
        )
        return {entry["Key"] for entry in listed.get("Contents", [])}


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    folder = tmp_path_factory.mktemp("team")
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        postgres = stack.enter_context(services.postgres("mlflow", "prefect"))
        keys = stack.enter_context(services.s3(folder / "s3", "qvgen"))
        for name, value in keys.items():  # for boto3 in this process
            patch.setenv(name, value)
        mlflow = stack.enter_context(services.mlflow(folder / "mlflow", postgres.uri("mlflow"), "s3://qvgen/mlflow", keys))
        database = postgres.uri("prefect", "postgresql+asyncpg")
        prefect = stack.enter_context(services.prefect(folder / "prefect", database, f"qvgen:{PASSWORD}"))
        yield Team(postgres, keys | prefect | {"MLFLOW_TRACKING_URI": mlflow}, folder)


@pytest.fixture
def project(team: Team, request: pytest.FixtureRequest) -> Path:
    """A checkout with a remote on S3, as docs/team.md sets it up; keys come from the environment."""
    root = team.folder / request.node.name
    root.mkdir()
    toy_project.make(root)
    for command in (
        "remote add -d team s3://qvgen/dvc",
        f"remote modify team endpointurl {team.variables['AWS_ENDPOINT_URL']}",
    ):
        code, output = run(root, "dvc", *command.split())
        assert code == 0, output
    git(root, "commit", "-qam", "remote")
    return root


def git(root: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def clone(team: Team, project: Path, name: str) -> Path:
    root = team.folder / name
    git(team.folder, "clone", "-q", str(project), name)
    return root


def flow(root: Path, team: Team) -> str:
    output, _ = toy_project.start_flow(root, **team.variables).communicate(timeout=PATIENCE)
    assert PASSWORD not in output
    return output


def test_two_hosts_that_start_at_once_share_one_experiment(team: Team, project: Path) -> None:
    """On an empty database: their locks are per checkout, so MLflow alone decides who creates it."""
    hosts = [project, clone(team, project, "beside")]
    processes = [start(root, "dvc", "repro", "a", **team.variables) for root in hosts]
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "warning" not in "".join(outputs), outputs
    assert team.postgres.query("mlflow", "SELECT count(*) FROM experiments WHERE name = 'qvgen'") == [(1,)]
    assert len({r.data.tags["mlflow.parentRunId"] for r in team.runs("tags.`dvc.stage` = 'a'")}) >= 2


def test_a_flow_is_recorded_in_postgresql_and_s3_and_another_host_goes_on(team: Team, project: Path) -> None:
    output = flow(project, team)
    assert output.count("'state': 'Completed'") == 4, output
    (parent,) = {r.data.tags["mlflow.parentRunId"] for r in team.runs("tags.`dvc.stage` = 'd'")}
    children = team.runs(f"tags.mlflow.parentRunId = '{parent}'")
    ids = {r.info.run_id for r in children} | {parent}
    known = {row[0] for row in team.postgres.query("mlflow", "SELECT run_uuid FROM runs WHERE status = 'FINISHED'")}
    assert len(ids) == 5 and ids <= known
    assert team.postgres.query("prefect", "SELECT state_name FROM flow_run") == [("Completed",)]
    assert any(key.endswith(f"{parent}/artifacts/results/dvc.lock") for key in team.objects("mlflow/"))

    code, output = run(project, "dvc", "push", **team.variables)
    assert code == 0, output
    recorded = {tags[key] for r in children for tags in [r.data.tags] for key in tags if key.startswith("dvc.out.")}
    stored = {key.removeprefix("dvc/files/md5/").replace("/", "") for key in team.objects("dvc/")}
    assert recorded and recorded <= stored
    git(project, "add", "dvc.lock")
    git(project, "commit", "-qm", "results")

    other = clone(team, project, "other")
    code, output = run(other, "dvc", "pull", **team.variables)
    assert code == 0, output
    assert (other / "artifacts" / "d" / "value").read_text() == "d 0"
    output = flow(other, team)
    assert output.count("'state': 'Cached'") == 4, output
    stages = {r.info.run_id: r.data.tags["dvc.stage"] for r in children}
    cached = team.runs("tags.`stage.state` = 'cached'")
    assert [stages[r.data.tags["produced_by"]] for r in cached] == [r.data.tags["dvc.stage"] for r in cached]
    assert {r.data.tags["dvc.stage"] for r in cached} == set("abcd")

    # No password is in what git or MLflow keeps.
    kept = [project / path for path in git(project, "ls-files").splitlines()]
    assert not [path for path in kept if path.is_file() and PASSWORD in path.read_text(errors="ignore")]
    assert not [entry for entry in team.runs() if PASSWORD in str(entry.data.tags) + str(entry.data.params)]
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == PASSWORD  # what is looked for is what is used


def test_a_database_that_dies_in_the_middle_loses_nothing(team: Team, project: Path) -> None:
    code, output = run(project, "dvc", "repro", "a", **team.variables)
    assert code == 0, output
    before = len(team.runs())
    (project / "params.yaml").write_text((project / "params.yaml").read_text().replace("seed: 0", "seed: 5"))
    team.postgres.kill()
    try:
        code, output = run(project, "dvc", "repro", "a", **team.variables)
        assert code == 0 and output.count("does not answer") == 1 and PASSWORD not in output, output
    finally:
        team.postgres.start()
    for sent in (2, 0):  # a and its parent
        code, output = run(project, "pipelines.cli", "lineage", "sync", **team.variables)
        assert code == 0 and f"{sent} runs sent, 0 left" in output, output
    assert len(team.runs()) == before + 2
    assert team.runs("tags.`dvc.stage` = 'a'")[-1].data.params["seed"] == "5"


def test_the_kubernetes_deployment_is_accepted(team: Team) -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    create = ["work-pool", "create", "qvgen-kubernetes", "--type", "kubernetes"]
    create += ["--base-job-template", "deploy/job-template.json"]
    for command in (create, ["--no-prompt", "deploy", "--all", "--prefect-file", "deploy/kubernetes.yaml"]):
        code, output = run(toy_project.ROOT, "prefect", *command, **team.variables)
        assert code == 0, output
    settings = {setting: team.variables[setting.name] for setting in (PREFECT_API_URL, PREFECT_API_AUTH_STRING)}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        found = client.read_deployment_by_name("qvgen-retrain/nightly")
    assert found.work_pool_name == "qvgen-kubernetes" and found.parameters == {"root": ".", "push": True}
    assert [next(iter(step)).rpartition(".")[2] for step in found.pull_steps or []] == ["git_clone", "run_shell_script"]
    assert found.job_variables["namespace"] == "qvgen" and found.concurrency_options is not None
