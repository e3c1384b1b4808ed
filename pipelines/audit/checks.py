"""The checks of `qvgen audit`: each holds one claim of the record against git, DVC or the registry."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from pipelines.audit.lineage import Lineage, Step
from pipelines.audit.project import WORKTREE, Project
from stages.record.model.version import IDENTITY
from stages.record.runs import DATA
from stages.record.sender import LONGEST_PARAM, _name
from stages.register import MEASURED, PACKED
from stages.runtime.dvc import fingerprint, flatten

ANEW = "delete the version in MLflow, then `dvc repro --force register`"
_REDO = "delete the version in MLflow, then `dvc repro --force` from a clean tree"
ANEW_RUN = "somebody changed the run: `dvc repro --force` records it anew"
SHA256 = "sha256."
COMMIT = "`git add dvc.lock stages/dvc.lock metrics && git commit -m Results`"
CLOCKS = 300_000  # milliseconds that the clocks of two hosts may differ
CODE = "code."  # parameters that stand for the code of a stage
INPUTS = "inputs."  # and for folders that params.yaml names, which git need not have: dvc.lock and the seal hold them


State = Literal["PASS", "FAIL", "TODO", "WARN"]


@dataclass(frozen=True)
class Check:
    """One claim and whether it holds. `detail` of one that does not ends with what to do."""

    name: str
    state: State  # TODO: it will hold once something is committed; WARN: the record is right, this checkout is not
    detail: str

    @property
    def ok(self) -> bool:
        return self.state == "PASS"

    def __str__(self) -> str:
        return f"{self.state}  {self.name:<14}{self.detail}"


def registry_checks(lineage: Lineage) -> Iterator[Check]:
    """Version, logged model, fingerprint and every run."""
    tags, model, source = lineage.version.tags, lineage.model, lineage.source
    if model is None:
        yield Check("logged model", "FAIL", f"{lineage.version.source} is deleted; {ANEW}")
    else:
        keys = [key for key in tags if key == IDENTITY or key.startswith((SHA256, "dvc."))]
        differing = [key for key in keys if model.tags.get(key) != tags[key]]
        yield verdict(
            "logged model",
            [f"tag {key} of the version is {tags[key]}, of the logged model {model.tags.get(key)}" for key in differing],
            f"{model.model_id}, with the version's {len(keys)} hashes",
            f"somebody changed a tag: {ANEW}",
        )
    if source is None:
        run = lineage.version.run_id
        yield Check("runs", "FAIL", f"the registering run {run} is not in MLflow; {ANEW}")
        return
    parts = [source.deps.get(path) for path in (PACKED, *MEASURED)]
    yield verdict(
        "fingerprint",
        [] if fingerprint(parts) == tags.get(IDENTITY) else [f"tag {IDENTITY} is not the hash of what {source} read"],
        f"of {PACKED} and its metrics, as {source} read them",
        f"the version was not made by this run: {ANEW}",
    )
    yield from _run_checks(lineage, source)


def _run_checks(lineage: Lineage, source: Step) -> Iterator[Check]:
    faults = [f"{step} is deleted" for step in lineage.steps if step.deleted]
    faults += [f"{step} ended as {step.status}" for step in lineage.steps if step.status != "FINISHED"]
    names = " <- ".join(step.stage for step in lineage.steps)
    yield verdict("runs", faults, f"{len(lineage.steps)}: {names}", "`mlflow runs restore --run-id ID` brings a run back")
    ids = list(dict.fromkeys(step.parent for step in lineage.steps if step.parent))
    faults = [f"run {id} is not in MLflow" for id in ids if id not in lineage.parents]
    faults += [f"{step} is deleted" for step in lineage.parents.values() if step.deleted]
    faults += [f"{step} has no parent run" for step in lineage.steps if step.parent is None]
    yield verdict("parent runs", faults, ", ".join(ids), "`mlflow runs restore --run-id ID` brings a run back")
    yield verdict("times", list(_time_faults(lineage)), "each run began after what it read, and ended later", ANEW_RUN)
    dirty = [f"{step} began in a tree with uncommitted changes" for step in _all(lineage) if step.dirty]
    dirty += [f"{step} does not say whether its tree was clean" for step in _all(lineage) if step.dirty is None]
    yield verdict("clean tree", dirty, "nothing was uncommitted when the runs began", "commit, then `dvc repro -f` that stage")


def _time_faults(lineage: Lineage) -> Iterator[str]:
    """Two hosts have two clocks."""
    for step in lineage.steps:
        if not 0 < step.started <= step.ended:
            yield f"{step} began at {_time(step.started)} and ended at {_time(step.ended)}"
        if step.ended > time.time() * 1000 + CLOCKS:
            yield f"{step} ended in the future, at {_time(step.ended)}"
        parent = lineage.parents.get(step.parent or "")
        if parent is not None and parent.started > step.started + CLOCKS:
            yield f"{step} began at {_time(step.started)}, before its parent run, at {_time(parent.started)}"
    for step, writer in lineage.reads:
        if writer.ended > step.started + CLOCKS:
            yield f"{step} began at {_time(step.started)}, before {writer} had ended, at {_time(writer.ended)}"


def _time(milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M:%S}" if milliseconds else "no time"


def git_checks(lineage: Lineage, project: Project) -> Iterator[Check]:
    """Commit, code, sources, parameters: what git holds of what the runs recorded."""
    commits = dict.fromkeys(step.commit or "" for step in _all(lineage))
    found = [commit for commit in commits if project.has_commit(commit)]
    faults = [f"commit {commit or '(not recorded)'} is not in this repository" for commit in commits if commit not in found]
    faults += [f"commit {commit} is on no branch: a clone lacks it" for commit in found if not project.is_kept(commit)]
    yield verdict(
        "commit", faults, ", ".join(c[:12] for c in commits), "`git fetch --all` or `--unshallow`, or `git branch NAME COMMIT`"
    )
    steps = [step for step in lineage.steps if known(step, project)]
    named = [(step, name, value) for step in steps for name, value in step.params.items() if name.startswith(CODE)]
    orphans = {(step.id, path) for step, path in lineage.orphans}
    code, gaps, count = [], [], 0
    for step in steps:
        snapshot = project.at(step.commit or "")
        for path, md5 in step.deps.items():
            kept = snapshot.outs.get(path)
            if kept is None:
                count += 1
                found = snapshot.code.get((step.stage, path))
                if found != md5:
                    code.append(f"{path} of {step} was {md5}, in commit {(step.commit or '')[:12]} it is {found or 'absent'}")
            elif kept.source and kept.md5 != md5:
                code.append(f"{path} of {step} was {md5}, its .dvc file in commit {(step.commit or '')[:12]} says {kept.md5}")
            elif not (kept.source or kept.always) and (step.id, path) in orphans:
                gaps.append(f"no run in MLflow wrote {path} ({md5}), which {step} read")
    for step, name, value in named:
        count += 1
        commit = step.commit or ""
        if project.code(commit).get(name) != value:
            code.append(f"the code that {step} ran is not that of commit {commit[:12]}: another fingerprint")
    good = f"{count} fingerprints, files and folders are those of git"
    yield verdict("code", code, good, f"commit what really ran, or {_REDO}")
    faults = [
        f"dataset {path} of {step} is {step.datasets.get(path, 'absent')}, its tag is {step.deps.get(path, 'absent')}"
        for step in lineage.steps
        for path in sorted(step.datasets.keys() | {path for path in step.deps if path.startswith(DATA)})
        if step.datasets.get(path) != step.deps.get(path)
    ]
    yield verdict("datasets", faults, f"{sum(len(s.datasets) for s in lineage.steps)} digests are those of the tags", ANEW_RUN)
    yield verdict("producers", gaps, "every input of every run was written by a recorded run", _REDO)
    yield _params_check(steps, project)


def _params_check(steps: list[Step], project: Project) -> Check:
    faults, count = [], 0
    for step in steps:
        commit = step.commit or ""
        entry = project.lock_entry(commit, step.stage) or {}
        stated = project.params(commit, list(dict.fromkeys(["params.yaml", *entry.get("params", {})])))
        for name, value in step.params.items():
            if name.startswith((CODE, INPUTS)):
                continue
            count += 1
            if stated.get(name, "")[:LONGEST_PARAM] != value:
                faults.append(f"{name} was {value} in {step}, in commit {commit[:12]} it is {stated.get(name, 'absent')}")
    return verdict("parameters", faults, f"{count} recorded values are those of params.yaml", "commit params.yaml, run again")


def lock_check(lineage: Lineage, project: Project) -> tuple[Check, str | None]:
    """The commit whose dvc.lock has every hash and parameter of the lineage, and no other; WORKTREE if it is not committed.
    The pipeline writes dvc.lock after its runs, so it is often in a later commit than theirs."""
    source = lineage.source
    if source is None or not known(source, project):
        return Check("dvc.lock", "FAIL", "without the run's commit there is no dvc.lock to look at"), None
    start = source.commit or ""
    for commit in [start, *project.later_commits(start, "dvc.lock")]:
        faults = _lock_faults(lineage, project, commit)
        if not faults:
            where = "the commit of the run" if commit == start else f"a later commit than the run's, {start[:12]}"
            return Check("dvc.lock", "PASS", f"{commit[:12]} ({where}) has every hash"), commit
    here = _lock_faults(lineage, project, WORKTREE)
    if not here:
        return Check("dvc.lock", "TODO", f"only the file in this checkout has every hash; {COMMIT}"), WORKTREE
    detail = f"dvc.lock with these hashes is not committed: {here[0]}; commit dvc.lock as these runs left it"
    return Check("dvc.lock", "FAIL", detail), None


def _lock_faults(lineage: Lineage, project: Project, commit: str) -> list[str]:
    faults, (packed, md5), where = [], lineage.packed, commit[:12] or "this checkout"
    locked: dict[str, str] = {}
    for step in lineage.steps:
        entry = project.lock_entry(commit, step.stage) or {}
        stated = [pair for group in (entry.get("params") or {}).values() for pair in flatten(group).items()]
        params = {_name(name): str(value)[:LONGEST_PARAM] for name, value in stated}
        kinds = {kind: {item["path"]: item.get("md5") for item in entry.get(kind, [])} for kind in ("deps", "outs")}
        locked |= kinds["deps"] | kinds["outs"]
        for listed, recorded in ((kinds["deps"], step.deps), (kinds["outs"], step.outs), (params, step.params)):
            faults += [
                f"in {where} {name} of {step.stage} is {listed.get(name, 'absent')}, recorded {recorded.get(name, 'nothing')}"
                for name in sorted(listed.keys() | recorded.keys())
                if listed.get(name) != recorded.get(name)
            ]
        command = project.at(step.commit or "").commands.get(step.stage) if known(step, project) else None
        if entry.get("cmd") != command:
            faults.append(f"in {where} {step.stage} ran `{entry.get('cmd', 'nothing')}`, dvc.yaml says `{command}`")
    if locked.get(packed) != md5:
        faults.append(f"in {where} {packed} is {locked.get(packed, 'absent')}, the version says {md5}")
    return faults


def verdict(name: str, faults: list[str], good: str, remedy: str) -> Check:
    """FAIL with the first two faults if there are any."""
    if not faults:
        return Check(name, "PASS", good)
    more = f" and {len(faults) - 2} more" if len(faults) > 2 else ""
    return Check(name, "FAIL", f"{'; '.join(faults[:2])}{more}; {remedy}")


def known(step: Step, project: Project) -> bool:
    return project.has_commit(step.commit or "")


def _all(lineage: Lineage) -> list[Step]:
    return [*lineage.steps, *lineage.parents.values()]
