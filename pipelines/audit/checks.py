"""The checks of `qvgen audit`: each holds one claim of the record against git, DVC or the registry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.audit.lineage import Lineage, Step
from pipelines.audit.project import WORKTREE, Project
from stages.register import IDENTITY, MEASURED, PACKED
from stages.runtime.dvc import fingerprint

ANEW = "delete the version in MLflow, then `dvc repro --force register`"
_REDO = "delete the version in MLflow, then `dvc repro --force` from a clean tree"
SHA256 = "sha256."
_LONGEST_PARAM = 6000  # characters; stages/record/sender.py cuts there


@dataclass(frozen=True)
class Check:
    """One claim and whether it holds. `detail` of a failed one ends with what to do."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'PASS' if self.ok else 'FAIL'}  {self.name:<14}{self.detail}"


def registry_checks(lineage: Lineage) -> Iterator[Check]:
    """Version, logged model, fingerprint and every run."""
    tags, model, source = lineage.version.tags, lineage.model, lineage.source
    if model is None:
        yield Check("logged model", False, f"{lineage.version.source} is deleted; {ANEW}")
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
        yield Check("runs", False, f"the registering run {run} is not in MLflow; {ANEW}")
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
    if source.parent is None:
        faults.append(f"{source} has no parent run")
    yield verdict("parent runs", faults, ", ".join(ids), "`mlflow runs restore --run-id ID` brings a run back")
    dirty = [f"{step} began in a tree with uncommitted changes" for step in _all(lineage) if step.dirty]
    dirty += [f"{step} does not say whether its tree was clean" for step in _all(lineage) if step.dirty is None]
    yield verdict("clean tree", dirty, "nothing was uncommitted when the runs began", "commit, then `dvc repro -f` that stage")


def git_checks(lineage: Lineage, project: Project) -> Iterator[Check]:
    """Commit, code, sources, parameters: what git holds of what the runs recorded."""
    commits = dict.fromkeys(step.commit or "" for step in _all(lineage))
    found = [commit for commit in commits if project.has_commit(commit)]
    faults = [f"commit {commit or '(not recorded)'} is not in this repository" for commit in commits if commit not in found]
    faults += [f"commit {commit} is on no branch: a clone lacks it" for commit in found if not project.is_kept(commit)]
    yield verdict("commit", faults, ", ".join(c[:12] for c in commits), "`git fetch --all`, or `git branch NAME COMMIT`")
    steps = [step for step in lineage.steps if known(step, project)]
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
    yield verdict(
        "code", code, f"{count} files and folders have the recorded hashes in git", f"commit what really ran, or {_REDO}"
    )
    yield verdict("producers", gaps, "every input of every run was written by a recorded run", _REDO)
    yield _params_check(steps, project)


def _params_check(steps: list[Step], project: Project) -> Check:
    faults, count = [], 0
    for step in steps:
        commit = step.commit or ""
        entry = project.lock_entry(commit, step.stage) or {}
        stated = project.params(commit, list(dict.fromkeys(["params.yaml", *entry.get("params", {})])))
        for name, value in step.params.items():
            count += 1
            if stated.get(name, "")[:_LONGEST_PARAM] != value:
                faults.append(f"{name} was {value} in {step}, in commit {commit[:12]} it is {stated.get(name, 'absent')}")
    return verdict("parameters", faults, f"{count} recorded values are those of params.yaml", "commit params.yaml, run again")


def lock_check(lineage: Lineage, project: Project) -> tuple[Check, str | None]:
    """The commit whose dvc.lock has every hash of the lineage. The pipeline writes dvc.lock after its runs, so it is often
    in a later commit than theirs."""
    source = lineage.source
    if source is None or not known(source, project):
        return Check("dvc.lock", False, "without the run's commit there is no dvc.lock to look at"), None
    start = source.commit or ""
    for commit in [start, *project.later_commits(start, "dvc.lock")]:
        faults = _lock_faults(lineage, project, commit)
        if not faults:
            where = "the commit of the run" if commit == start else f"a later commit than the run's, {start[:12]}"
            return Check("dvc.lock", True, f"{commit[:12]} ({where}) has every hash"), commit
    here = _lock_faults(lineage, project, WORKTREE)
    if here:
        reason, fix = here[0], "commit dvc.lock as these runs left it"
    else:
        reason, fix = "only the file in this checkout has them", '`git add dvc.lock metrics && git commit -m "Results"`'
    return Check("dvc.lock", False, f"dvc.lock with these hashes is not committed: {reason}; {fix}"), None


def _lock_faults(lineage: Lineage, project: Project, commit: str) -> list[str]:
    faults, (packed, md5), where = [], lineage.packed, commit[:12] or "this checkout"
    locked: dict[str, str] = {}
    for step in lineage.steps:
        entry = project.lock_entry(commit, step.stage) or {}
        for kind, recorded in (("deps", step.deps), ("outs", step.outs)):
            listed = {item["path"]: item.get("md5") for item in entry.get(kind, [])}
            locked |= listed
            faults += [
                f"in {where} {path} of {step.stage} is {listed.get(path, 'absent')}, recorded {value}"
                for path, value in recorded.items()
                if listed.get(path) != value
            ]
    if locked.get(packed) != md5:
        faults.append(f"in {where} {packed} is {locked.get(packed, 'absent')}, the version says {md5}")
    return faults


def verdict(name: str, faults: list[str], good: str, remedy: str) -> Check:
    """FAIL with the first two faults if there are any."""
    if not faults:
        return Check(name, True, good)
    more = f" and {len(faults) - 2} more" if len(faults) > 2 else ""
    return Check(name, False, f"{'; '.join(faults[:2])}{more}; {remedy}")


def known(step: Step, project: Project) -> bool:
    return project.has_commit(step.commit or "")


def _all(lineage: Lineage) -> list[Step]:
    return [*lineage.steps, *lineage.parents.values()]
