"""The pipeline as a Prefect flow: one task per DVC stage, in DVC's order, as many at a time as its graph allows.

Each task is `dvc repro --single-item STAGE` in a process of its own, so DVC alone decides what is up to date, and the record
in MLflow is that of a plain `dvc repro`. Import this only after `use_prefect` (pipelines/run/prefect_home.py).
"""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prefect import allow_failure, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.runtime import flow_run, task_run
from prefect.states import Completed, State

from pipelines.run.checkout import environment, only_one
from pipelines.run.dag import Graph, Plan, in_order, names_of_none, read_plan, waiting_for_all
from pipelines.run.guard import DEADLINE
from pipelines.run.lineage import close_execution, runs_of_execution
from pipelines.run.runners import task_runner
from qvgen.params import FlowSettings, load_params
from stages import observe

CACHED, RUN_CACHE, RAN = "Cached", "RunCache", "Completed"  # names of states, as Prefect shows them
_SAID = {"didn't change, skipping": CACHED, "is cached - skipping run": RUN_CACHE}  # by DVC, about the stage
# Of DVC after each stage: advice for somebody who calls it by hand, and what every stage does.
_NOISE = re.compile(
    r"\s*$|> |(Generating|Updating) lock file|To (track the changes with git|enable auto staging)|Use `dvc push`|"
    r"\s+(git add|dvc config core\.autostage)"
)
# Threads of OpenMP that wait for one whose core another stage has taken would keep the other cores busy: two trainings side by
# side took 5 times as long as one (LOG.md). Nothing is computed differently.
SHARED = {"OMP_WAIT_POLICY": "PASSIVE"}
_children: set[subprocess.Popen[str]] = set()
_children_lock = threading.Lock()


_stopped = threading.Event()  # by the user: what then fails, fails because of that


class StageError(RuntimeError):
    """A stage's command failed, or took longer than its deadline."""


def _plainly(record: logging.LogRecord) -> bool:
    """A stage that failed has said why in its own lines; Prefect's traceback would show only where this file waits for it."""
    if record.exc_info and isinstance(record.exc_info[1], StageError):
        record.exc_info = None
    return not _stopped.is_set()


def _worth_saying(line: str) -> bool:
    # A function: Dask and Ray pickle what a task's own code names, and an event cannot be.
    return not _NOISE.match(line) and not _stopped.is_set()


for _name in ("prefect.task_runs", "prefect.flow_runs"):
    logging.getLogger(_name).addFilter(_plainly)


@task(task_run_name="{address}")
def run_stage(
    address: str, root: str, upstream: list[str], unchanged: bool, deadline: float | None, variables: dict[str, str]
) -> State:
    """One DVC stage; returns a state named Cached (up to date), RunCache (DVC had its outputs from before) or Completed.

    `upstream` holds the states of the stages it needs, `unchanged` whether it was up to date when the flow began. Raises
    StageError.
    """
    if unchanged and all(name == CACHED for name in upstream):
        return Completed(name=CACHED, message="up to date", data=CACHED)
    log = get_run_logger()
    limit = [] if deadline is None else ["--deadline", f"{deadline:g}"]
    dvc = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", address]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.run.guard", *limit, "--", *dvc],
        cwd=root,
        env=environment(Path(root)) | variables | {"QVGEN_PREFECT_TASK_RUN": str(task_run.id)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ray kills the process group of a worker that ends; a guard has to live to end its stage
    )
    said = RAN
    with _listed(process):
        assert process.stdout is not None
        for line in process.stdout:
            if _worth_saying(line):
                log.info(line.rstrip())
            said = next((state for words, state in _SAID.items() if words in line and address in line), said)
        code = process.wait()
    if code == DEADLINE:
        raise StageError(f"stage {address} took longer than {deadline:g} s; raise flow.deadlines.{address} in params.yaml")
    if code:
        raise StageError(f"stage {address} failed with exit code {code}; its last lines are in this task's log")
    return Completed(name=said, data=said)


@flow(name="qvgen", log_prints=True)
def pipeline(root: str, targets: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the stages of `root`'s dvc.yaml, or `targets` and what they need. Returns one row per stage: stage, state, seconds
    and MLflow run. Raises StageError after all stages that can run have run.
    """
    folder = Path(root)
    settings = load_params(folder / "params.yaml").flow
    with only_one(folder):
        execution = f"prefect-{flow_run.id}"
        variables = {"QVGEN_EXECUTION": execution, "QVGEN_PREFECT_FLOW_RUN": str(flow_run.id)}
        observe.write(folder)  # what stages depend on besides parameters and data: without it, what changed is not known yet
        plan = read_plan(folder, targets or ())
        for setting in ("alone", "deadlines", "retries"):
            for name in names_of_none(plan, getattr(settings, setting)):
                get_run_logger().warning(
                    f"params.yaml: flow.{setting} names {name!r}, and no dvc.yaml has a stage of that name"
                )
        with _stopping_children():
            states = _run(folder, plan, settings, variables)
        close_execution(folder, execution, [name for name, (state, _) in states.items() if state == CACHED])
    runs = runs_of_execution(folder, execution)
    rows = [
        {"stage": name, "state": state, "seconds": round(seconds, 1), "run": runs.get(name, "")}
        for name, (state, seconds) in states.items()
    ]
    create_table_artifact(rows, key="stages", description="What became of each stage, and its run in MLflow")
    create_markdown_artifact(mermaid(plan.graph, {name: state for name, (state, _) in states.items()}), key="dag")
    failed = [row["stage"] for row in rows if row["state"] not in (CACHED, RUN_CACHE, RAN)]
    if failed:
        raise StageError(f"{len(failed)} of {len(rows)} stages failed or lack what they need: {', '.join(failed)}")
    return rows


def run_pipeline(root: Path, targets: list[str] | None = None) -> list[dict[str, Any]]:
    """The flow with the task runner that params.yaml names."""
    settings = load_params(root / "params.yaml").flow
    return pipeline.with_options(task_runner=task_runner(settings.runner, settings.workers))(str(root), targets)


def _run(root: Path, plan: Plan, settings: FlowSettings, variables: dict[str, str]) -> dict[str, tuple[str, float]]:
    """Stage -> name of its final state, seconds. A stage whose upstream failed stays NotReady."""
    graph, futures = plan.graph, {}
    apart = waiting_for_all(graph, settings.alone)
    for name in in_order({name: needs | apart.get(name, set()) for name, needs in graph.items()}):
        base = name.partition("@")[0]
        configured: Any = run_stage.with_options(retries=settings.retries.get(base, 0), retry_delay_seconds=10)
        # One that runs every time has told all that it has to tell in `changed`.
        needs = [futures[up] for up in sorted(graph[name] - plan.always)]
        deadline = settings.deadlines.get(base, settings.deadline)
        also = [futures[up] for up in sorted(graph[name] & plan.always)]
        also += [allow_failure(futures[other]) for other in sorted(apart.get(name, ()))]
        beside = variables | (SHARED if settings.workers > 1 and name not in apart else {})
        futures[name] = configured.submit(name, str(root), needs, name not in plan.changed, deadline, beside, wait_for=also)
    states = {}
    for name, future in futures.items():
        started = time.monotonic()
        future.wait()
        states[name] = (future.state.name or future.state.type.value, _seconds(future, time.monotonic() - started))
    return states


def _seconds(future: Any, waited: float) -> float:
    from prefect.client.orchestration import get_client

    with suppress(Exception), get_client(sync_client=True) as client:
        return client.read_task_run(future.task_run_id).total_run_time.total_seconds()
    return waited


def mermaid(graph: Graph, states: dict[str, str]) -> str:
    """The graph as a mermaid flowchart in Markdown, each stage with its state."""
    number = {name: f"s{i}" for i, name in enumerate(graph)}
    nodes = [f'    {number[name]}["{name}<br/>{states.get(name, "")}"]' for name in graph]
    edges = [f"    {number[up]} --> {number[name]}" for name, needs in graph.items() for up in sorted(needs & graph.keys())]
    return "\n".join(["```mermaid", "flowchart TD", *nodes, *edges, "```"])


@contextmanager
def _listed(process: subprocess.Popen[str]) -> Iterator[None]:
    with _children_lock:
        _children.add(process)
    try:
        yield
    finally:
        with _children_lock:
            _children.discard(process)


@contextmanager
def _stopping_children() -> Iterator[None]:
    """A flow that is cancelled stops the stages it started; the guards do it themselves when the flow is killed."""
    _stopped.clear()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):  # Ctrl-C, SIGTERM as Prefect raises it
            _stopped.set()
        with _children_lock:
            running = list(_children)
        for process in running:
            process.send_signal(signal.SIGTERM)
        raise
