"""Retraining on a real schedule: cron fires by itself, an overlap waits, a cancelled run leaves no process."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import toy_project
from tests.support.toy_project import processes_in, start, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return toy_project.make(tmp_path)


@pytest.fixture
def served(project: Path, prefect_server: dict[str, str]) -> Iterator[Path]:
    """`qvgen serve` for the project, every minute."""
    process = start(project, "pipelines.cli", "serve", "--cron", "* * * * *", **prefect_server)
    try:
        yield project
    finally:
        process.terminate()
        process.communicate(timeout=60)


def flow_runs(client: Any) -> list[Any]:
    """Runs of the deployment that have begun or ended, oldest first."""
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    only = FlowFilter(name=FlowFilterName(any_=["qvgen-retrain"]))
    runs = client.read_flow_runs(flow_filter=only, sort=FlowRunSort.EXPECTED_START_TIME_ASC)
    return [run for run in runs if run.state.type.value != "SCHEDULED"]


def carried_out(client: Any) -> list[Any]:
    """Runs that came to an end of their own. On a busy machine a run takes more than a minute, and checks that came
    due meanwhile are skipped."""
    return [run for run in flow_runs(client) if run.state.is_final() and not run.state.is_cancelled()]


def branches(project: Path) -> list[str]:
    command = ["git", "for-each-ref", "--format=%(refname:short)", "refs/heads/retrain"]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout.split()


def test_a_schedule_retrains_when_something_changed(
    served: Path, prefect_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
    from prefect.states import Cancelling

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=served, capture_output=True, text=True, check=True).stdout.strip()

    head, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    settings = {setting: prefect_server[setting.name] for setting in (PREFECT_API_URL, PREFECT_API_AUTH_STRING)}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        # Nothing has run yet, so all stages are to do: the first run by itself does them.
        first = wait_until(lambda: carried_out(client), lambda: str(flow_runs(client)))[0]
        assert first.auto_scheduled and first.state.is_completed(), first.state
        assert (served / "artifacts" / "d" / "value").read_text() == "d 0"
        (branch,) = branches(served)
        assert "dvc.lock" in git("ls-tree", "--name-only", branch)
        assert "metrics/seal.jsonl" in git("ls-tree", "-r", "--name-only", branch).split()
        written = "?? dvc.lock\n?? metrics/seal.jsonl"  # by the run itself, in the checkout
        assert git("rev-parse", "HEAD") == head and git("status", "--porcelain") == f"{status}\n{written}".strip()

        second = wait_until(lambda: carried_out(client)[1:], lambda: str(flow_runs(client)))[0]
        assert second.state.name == "Unchanged", second.state

        (served / "ask").write_text("hang b")
        (served / "params.yaml").write_text((served / "params.yaml").read_text().replace("seed: 0", "seed: 1"))
        wait_until((served / "started").exists)
        running = next(r for r in flow_runs(client) if r.state.is_running())
        skipped = {run.id for run in flow_runs(client) if run.state.is_cancelled()}
        asked = client.create_flow_run_from_deployment(running.deployment_id)

        def waiting() -> set[Any]:
            runs = client.read_flow_runs(limit=200)
            return {run.id for run in runs if run.state.name == "AwaitingConcurrencySlot"}

        wait_until(lambda: asked.id in waiting() and len(waiting()) > 2, lambda: str(client.read_flow_runs()))
        assert {run.id for run in flow_runs(client) if run.state.is_cancelled()} == skipped, "what would overlap waits"
        (served / "ask").unlink()
        client.set_flow_run_state(running.id, Cancelling(), force=True)
        wait_until(lambda: client.read_flow_run(running.id).state.is_cancelled(), lambda: str(flow_runs(client)))
        hung = [line for line in processes_in(served) if "stages.b" in line or "guard" in line]
        done = wait_until(lambda: [r for r in carried_out(client)[2:] if r.id == asked.id], lambda: str(flow_runs(client)))[0]
        assert done.state.is_completed(), "what somebody asked for is neither cancelled nor skipped"
        wait_until(lambda: not [x for x in processes_in(served) if "stages.b" in x or "guard" in x], lambda: str(hung), 60)
        late = [run for run in flow_runs(client) if run.state.name == "Skipped" and run.id not in skipped]
        assert late, "checks that came due meanwhile do not pile up"
    assert len(branches(served)) == 2  # a run that did not finish keeps nothing, the next one does


def test_a_checkout_that_does_not_stay_pushes_data_and_branch(project: Path, prefect_server: dict[str, str]) -> None:
    """As in a pod; then without a remote for the data: the branch, which would name data that nobody has, stays here."""
    there, data = project / ".qvgen" / "there.git", project / ".qvgen" / "data"
    subprocess.run(["git", "init", "-q", "--bare", str(there)], check=True)
    subprocess.run(["git", "remote", "add", "origin", str(there)], cwd=project, check=True)
    assert toy_project.run(project, "dvc", "remote", "add", "-d", "data", str(data))[0] == 0
    script = "from pipelines.run.retrain import retrain\nprint(retrain('.', push=True))\n"
    (project / "run_flow.py").write_text(script)
    code, output = toy_project.run(project, "run_flow", **prefect_server)
    assert code == 0, output
    (branch,) = branches(project)
    assert branches(there) == [branch]
    assert len([path for path in data.glob("files/md5/??/*") if path.is_file()]) >= 4
    assert list((data / "runs").rglob("*")), "what spares the next checkout the computation"

    (project / "params.yaml").write_text((project / "params.yaml").read_text().replace("seed: 0", "seed: 9"))
    assert toy_project.run(project, "dvc", "remote", "remove", "data")[0] == 0
    code, output = toy_project.run(project, "run_flow", **prefect_server)
    assert code != 0 and "so the new model is not promoted" in output, output
    assert branches(there) == [branch]
