"""From a version in the model registry back to every run that had a part in it, by the hashes that runs record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

_DEP, _OUT = "dvc.dep.", "dvc.out."
CACHED = "cached"  # tag stage.state of a run that only says that a stage was up to date: it produced nothing


@dataclass(frozen=True)
class Step:
    """One recorded run of a stage, or of the whole pipeline (then without stage, dependencies and outputs)."""

    id: str
    stage: str
    status: str  # FINISHED, FAILED, KILLED, RUNNING
    deleted: bool
    started: int  # milliseconds since 1970
    ended: int  # 0: it has not
    parent: str | None
    commit: str | None
    dirty: bool | None  # None: not recorded
    deps: dict[str, str]  # path -> DVC hash
    outs: dict[str, str]
    params: dict[str, str]
    tags: dict[str, str]
    metrics: frozenset[str]  # names
    datasets: dict[str, str]  # path -> digest
    cached: bool

    @classmethod
    def of(cls, run: Run) -> Step:
        tags = run.data.tags
        return cls(
            id=run.info.run_id,
            stage=tags.get("dvc.stage", ""),
            status=run.info.status,
            deleted=run.info.lifecycle_stage != "active",
            started=run.info.start_time or 0,
            ended=run.info.end_time or 0,
            parent=tags.get("mlflow.parentRunId"),
            commit=tags.get("git.commit"),
            dirty={"true": True, "false": False}.get(tags.get("git.dirty", "")),
            deps={key.removeprefix(_DEP): value for key, value in tags.items() if key.startswith(_DEP)},
            outs={key.removeprefix(_OUT): value for key, value in tags.items() if key.startswith(_OUT)},
            params=dict(run.data.params),
            tags=dict(tags),
            metrics=frozenset(run.data.metrics),
            datasets={x.dataset.name: x.dataset.digest for x in (run.inputs.dataset_inputs if run.inputs else [])},
            cached=tags.get("stage.state") == CACHED,
        )

    def __str__(self) -> str:
        return f"{self.stage or 'pipeline'} (run {self.id})"


class Runs:
    """Every run of an experiment, deleted ones too, and who wrote what."""

    def __init__(self, client: MlflowClient, experiment: str) -> None:
        self.by_id = {run.info.run_id: Step.of(run) for run in _all_runs(client, experiment)}
        self._writers: dict[tuple[str, str], list[Step]] = {}
        for step in sorted(self.by_id.values(), key=lambda step: step.started):
            for output in step.outs.items() if not step.cached else ():
                self._writers.setdefault(output, []).append(step)

    def producer(self, path: str, md5: str, before: int) -> Step | None:
        """The last run that wrote these bytes to `path` and started no later than `before`, deleted or not; if all are later
        (two hosts, two clocks) the first. None if no run did."""
        writers = self._writers.get((path, md5), [])
        return next((step for step in reversed(writers) if step.started <= before), writers[0] if writers else None)

    def trace(self, source: str) -> list[Step]:
        """The run `source` and all that it rests on, nearest first; [] if MLflow has no such run."""
        found: dict[str, Step] = {}
        todo = [self.by_id[source]] if source in self.by_id else []
        while todo:
            step = todo.pop(0)
            if step.id not in found:
                found[step.id] = step
                producers = (self.producer(path, md5, step.started) for path, md5 in step.deps.items())
                todo += [producer for producer in producers if producer is not None and producer.id != step.id]
        return list(found.values())


@dataclass(frozen=True)
class Lineage:
    """A model version and the recorded runs that made it."""

    version: ModelVersion
    model: LoggedModel | None  # None: deleted, or never there
    steps: list[Step]  # the registering run first
    parents: dict[str, Step] = field(default_factory=dict)  # id -> run of the pipeline; what is missing is left out
    reads: list[tuple[Step, Step]] = field(default_factory=list)  # a run, and one that wrote something it read
    orphans: list[tuple[Step, str]] = field(default_factory=list)  # dependencies that no run wrote: sources, or a gap

    @property
    def source(self) -> Step | None:
        return self.steps[0] if self.steps else None

    @property
    def commits(self) -> list[str]:
        """Of the runs, each once, that of the registering run first."""
        return list(dict.fromkeys(step.commit for step in self.steps if step.commit))

    @property
    def packed(self) -> tuple[str, str]:
        """Path and DVC hash of the packed model."""
        return self.version.tags.get("dvc.path", ""), self.version.tags.get("dvc.md5", "")


def read_lineage(client: MlflowClient, version: ModelVersion, runs: Runs) -> Lineage:
    """Walk upstream from `version`. Missing parts are left out, for the checks to find. Raises what MLflow raises."""
    from pipelines.champion.registry import logged_model_id

    try:
        model = _logged_model(client, logged_model_id(version))
    except ValueError:
        model = None
    steps = runs.trace(version.run_id or (model.source_run_id if model else None) or "")
    ids = dict.fromkeys(step.parent for step in steps if step.parent)
    parents = {id: runs.by_id[id] for id in ids if id in runs.by_id}
    orphans = [
        (step, path) for step in steps for path, md5 in step.deps.items() if runs.producer(path, md5, step.started) is None
    ]
    reads = [
        (step, writer)
        for step in steps
        for path, md5 in step.deps.items()
        if (writer := runs.producer(path, md5, step.started)) is not None
    ]
    return Lineage(version, model, steps, parents, reads, orphans)


def uses(lineage: Lineage, md5: str) -> list[tuple[Step, str]]:
    """Steps of the lineage that read the data of that hash, with its path; `md5` with or without .dir."""
    wanted = md5.removesuffix(".dir")
    return [
        (step, path) for step in lineage.steps for path, value in step.deps.items() if value.removesuffix(".dir") == wanted
    ]


def _logged_model(client: MlflowClient, id: str) -> LoggedModel | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_logged_model(id)  # refuses a deleted one
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _all_runs(client: MlflowClient, experiment: str) -> Iterator[Run]:
    from mlflow.entities import ViewType

    token = None
    while True:
        page = client.search_runs([experiment], run_view_type=ViewType.ALL, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
