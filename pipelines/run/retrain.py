"""Scheduled retraining: run the pipeline if anything has changed, keep the results on a branch, promote a good model.

`qvgen serve` gives this flow a schedule. Import it only after `use_prefect` (pipelines/run/prefect_home.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, State

from pipelines.champion.promote import promote_after_run
from pipelines.run.checkout import environment, project_root
from pipelines.run.dag import read_plan
from pipelines.run.flow import run_pipeline
from stages import observe
from stages.record.secrets import host_of, without_secrets

BRANCH = "retrain/{date}"
KEPT = ("dvc.lock", "stages/dvc.lock", "metrics", "reports")  # what the pipeline writes and git keeps
WEBHOOK = "QVGEN_WEBHOOK"  # address that is told of a failure


def notify(flow: Any, flow_run: Any, state: State) -> None:
    """POST {"text": ...} to the address in QVGEN_WEBHOOK, if there is one: what chat programs take."""
    address = os.environ.get(WEBHOOK)
    if not address:
        return
    text = f"qvgen retraining {flow_run.name}: {state.name}: {state.message or ''}"[:1000]
    try:
        request = urllib.request.Request(address, json.dumps({"text": text}).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10):
            pass
    except Exception as error:  # a message may quote the address, whose path is a password
        why = getattr(error, "code", None) or type(getattr(error, "reason", error)).__name__
        get_run_logger().warning("the webhook at %s (%s) was not told: %s", host_of(address), WEBHOOK, why)


@flow(name="qvgen-retrain", on_failure=[notify], on_crashed=[notify], log_prints=True)
def retrain(root: str = ".", force: bool = False, push: bool = False) -> State:
    """Run the pipeline of the checkout `root` if data, code or parameters changed since dvc.lock (or with `force`), commit
    dvc.lock and metrics to a branch retrain/<date>, and let the gate decide whether the new model becomes champion. The seal
    of that decision is a commit of its own on the branch, because it may be made only once the first one is kept.

    With `push`, for a checkout that does not outlive the run, data and branch go to their remotes first. A failure leaves
    champion and checkout as they were. State Unchanged: nothing had changed. Raises ValueError for another `root` than the
    checkout in which this runs: who may start a run must not thereby choose which dvc.yaml is executed.
    """
    folder = project_root()
    if Path(root).resolve() != folder.resolve():
        raise ValueError(f"root = {root}: this process retrains {folder} only; leave root out, or serve the other checkout")
    skip_waiting_checks()
    observe.write(folder)  # or a change of code would not be known yet
    plan = read_plan(folder)
    reasons = sorted(plan.changed - plan.always)
    if not reasons and not force:
        return Completed(name="Unchanged", message="data, code and parameters are those of dvc.lock")
    print(f"changed: {', '.join(reasons) or 'nothing, but it was asked for'}")
    rows = run_pipeline(folder)
    kept = commit_results(folder, f"Retraining of {datetime.now(UTC):%Y-%m-%d}, Prefect run {flow_run.id}")
    if push:
        publish(folder, kept.branch if kept else None)
    verdict = promote_after_run(folder)
    kept = keep_promotion(folder, kept, push)
    report = [f"Changed: {', '.join(reasons) or 'nothing'}.", f"Kept: {kept or 'no difference to commit'}.", "", verdict]
    create_markdown_artifact("\n".join(report), key="retraining", description="What a retraining did, and the gate's verdict")
    ran = sum(row["state"] == "Completed" for row in rows)
    return Completed(message=f"{ran} of {len(rows)} stages ran; {verdict.splitlines()[0] if verdict else ''}")


@dataclass(frozen=True)
class Committed:
    """Where the results of a retraining are in git."""

    branch: str
    commit: str

    def __str__(self) -> str:
        return f"{self.branch} ({self.commit[:10]})"


def skip_waiting_checks() -> None:
    """Cancel the scheduled runs of this deployment that came due while another run held the only slot: this one looks for
    changes now, so they have nothing to find. Runs that somebody asked for go on waiting. Without a deployment it does
    nothing, and a server that does not answer is no reason to stop."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.runtime import deployment
    from prefect.states import Cancelled
    from prefect.types._datetime import now

    if not deployment.id:
        return
    only = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
    scheduled = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
    try:
        with get_client(sync_client=True) as client:
            for run in client.read_flow_runs(deployment_filter=only, flow_run_filter=scheduled):
                due = run.expected_start_time is not None and run.expected_start_time <= now("UTC")
                if due and run.auto_scheduled and str(run.id) != flow_run.id:
                    reason = f"run {flow_run.name} looks for changes in its place"
                    client.set_flow_run_state(run.id, Cancelled(name="Skipped", message=reason), force=True)
    except Exception as error:
        print(f"checks that wait are not skipped: {type(error).__name__}")


def publish(root: Path, branch: str | None) -> None:
    """Push data, and what spares another checkout the computation, then the branch: no commit shall name data that nobody else
    has. Raises RuntimeError with what the command said."""
    commands = [[sys.executable, "-m", "dvc", "--wait-for-lock", "push", "--run-cache"]]
    if branch is not None:
        commands.append(["git", "push", "--quiet", "origin", branch])
    for command in commands:
        done = subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True, check=False)
        if done.returncode:
            said = without_secrets(done.stderr or done.stdout).strip()  # git names its remote, password and all
            raise RuntimeError(f"{' '.join(command[-3:])} failed, so the new model is not promoted: {said[-1000:]}")


def keep_promotion(root: Path, kept: Committed | None, push: bool) -> Committed | None:
    """Commit the seal of the promotion after the results, or alone if there were none; returns the newest commit. The model is
    champion by then, so that a remote that refuses the branch is a warning."""
    sealed = commit_results(root, "Seal of the promotion", kept)
    if sealed is None:
        return kept
    if push:
        done = subprocess.run(
            ["git", "push", "--quiet", "origin", sealed.branch],
            cwd=root,
            env=environment(root),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = without_secrets(done.stderr).strip()[-1000:]
            get_run_logger().warning("the seal of the promotion is on %s here only: %s", sealed.branch, said)
    return sealed


def commit_results(root: Path, message: str, onto: Committed | None = None) -> Committed | None:
    """Commit what the pipeline wrote to a new branch retrain/<date>, on top of HEAD, or to the branch of `onto`; None if there
    is nothing new or this is no git repository.

    The checkout, its index and its branch stay as they are: the commit is made in an index of its own.
    """
    with tempfile.TemporaryDirectory() as temporary:
        variables = os.environ | {"GIT_INDEX_FILE": str(Path(temporary) / "index")}

        def git(*command: str) -> str:
            done = subprocess.run(["git", *command], cwd=root, env=variables, capture_output=True, text=True, check=True)
            return done.stdout.strip()

        try:
            head = onto.commit if onto else git("rev-parse", "HEAD")
        except (OSError, subprocess.CalledProcessError):
            return None
        git("read-tree", head)
        kept = [path for path in KEPT if (root / path).exists()]
        git("add", "--", *kept)
        tree = git("write-tree")
        if tree == git("rev-parse", f"{head}^{{tree}}"):
            return None
        identity = ["-c", "user.name=qvgen", "-c", "user.email=qvgen@localhost"]
        with suppress(subprocess.CalledProcessError):  # the user's own, where there is one
            git("config", "user.email")
            identity = []
        commit = git(*identity, "commit-tree", tree, "-p", head, "-m", message)
        if onto:
            git("update-ref", f"refs/heads/{onto.branch}", commit, head)
            return Committed(onto.branch, commit)
        branch = BRANCH.format(date=f"{datetime.now(UTC):%Y-%m-%dT%H%M%S}")
        git("branch", branch, commit)
        return Committed(branch, commit)


def serve(root: Path, cron: str, timezone: str) -> None:
    """Wait for schedule and demand, until stopped. One retraining at a time: a run that would overlap waits, and of scheduled
    checks that wait one takes the place of all (`skip_waiting_checks`)."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.schedules import Cron

    retrain.serve(
        name="retrain",
        schedule=Cron(cron, timezone=timezone),
        parameters={"root": str(root)},
        global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
        tags=["qvgen"],
        description=retrain.__doc__,
    )
