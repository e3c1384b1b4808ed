"""The check of `qvgen audit` that holds MLflow's record of each run against its line in metrics/seal.jsonl, field by field."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.audit.checks import COMMIT, Check, verdict
from pipelines.audit.lineage import Lineage, Step
from pipelines.audit.project import WORKTREE, Project
from qvgen.hub.promotions import Promotion
from qvgen.hub.rollback import ROLLED_BACK
from stages.record.seal import FILE, chain_faults, curve_hash, read_lines, text_hash, value_of
from stages.record.sender import LONGEST_PARAM

if TYPE_CHECKING:
    from mlflow import MlflowClient

_REMEDY = "the record was changed, or made before runs were sealed: `dvc repro --force` makes it anew"
_ABSENT = "absent"
_OURS = ("dvc.", "git.", "machine.", "stage.")  # tags that nobody else may add


def seal_check(client: MlflowClient, lineage: Lineage, project: Project, lock_commit: str | None) -> Check:
    """Every run of the lineage, and its execution, is as it was sealed in the commit that has the results."""
    if lock_commit is None:
        return Check("seal", "FAIL", f"without a commit that has dvc.lock there is none that has {FILE}; see dvc.lock")
    text = _text(project, lock_commit)
    lines = {(entry.get("kind"), entry.get("id")): entry for entry in read_lines(text)}
    faults = [f"{FILE} in {lock_commit[:12] or 'this checkout'}: {fault}" for fault in chain_faults(text)]
    if lock_commit != WORKTREE:
        faults += _rewritten(project, lock_commit, text)
    for step in lineage.steps:
        line = lines.get(("run", step.tags.get("journal.id")))
        faults += [f"{step} is not sealed"] if line is None else _run_faults(client, lineage, step, line)
    for parent in lineage.parents.values():
        of_parent = [step for step in lineage.steps if step.parent == parent.id]
        ids = {line["execution"] for s in of_parent if (line := lines.get(("run", s.tags.get("journal.id"))))}
        for id in ids:
            line = lines.get(("execution", id))
            faults += [f"{parent} is not sealed"] if line is None else _parent_faults(client, parent, line)
    if source := lineage.source:
        line = lines.get(("run", source.tags.get("journal.id")))
        faults += _registered_faults(lineage, line["registered"]) if line else []
    if not faults and lock_commit == WORKTREE:
        return Check("seal", "TODO", f"{len(lineage.steps)} runs are as {FILE} has them, not committed yet; {COMMIT}")
    return verdict("seal", faults, f"{len(lineage.steps)} runs are as {FILE} had them in {lock_commit[:12]}", _REMEDY)


def promotion_check(project: Project, model: str, alias: str, record: Promotion, lock_commit: str | None) -> Check:
    """The newest recorded move of an alias is as it was sealed: with the results, in HEAD, or not committed yet."""
    id = f"{model}@{alias} {record.time}"
    kept = [lock_commit, *project.later_commits(lock_commit, str(FILE))] if lock_commit else []
    for where in (*kept, "HEAD", WORKTREE):  # retraining commits the seal of its promotion after the results
        for entry in read_lines(_text(project, where)):
            if entry.get("kind") != "promotion" or not str(entry.get("id")).startswith(f"{model}@{alias} "):
                continue
            sealed = entry.get("record") or {}
            same = sum(sealed.get(name) == value for name, value in asdict(record).items())
            if entry["id"] == id or (sealed.get("version") == record.version and same >= len(sealed) - 1):
                faults = [f"{name} of the move" for name, value in asdict(record).items() if sealed.get(name) != value]
                if faults:
                    return Check("promotion", "FAIL", f"{', '.join(faults)} is not what was sealed; see `git log {FILE}`")
                if where != WORKTREE:
                    return Check(
                        "promotion", "PASS", f"reason, author and the gate's {len(record.gate or {})} values as sealed"
                    )
                return Check("promotion", "TODO", f"the move to version {record.version} is not committed yet; {COMMIT}")
    how = f"`qvgen rollback --to {record.version} --reason TEXT` seals it" if ROLLED_BACK in (record.gate or {}) else ""
    how = how or "`qvgen promote` seals it"
    detail = f"the move to version {record.version} is not sealed in {FILE}; {how}, then commit the file"
    return Check("promotion", "FAIL", detail)


def _text(project: Project, commit: str) -> str:
    return (project.show(commit, str(FILE)) or b"").decode(errors="replace")


def _rewritten(project: Project, commit: str, text: str) -> list[str]:
    """Lines are only ever added."""
    if project.git("merge-base", "--is-ancestor", commit, "HEAD") is None:
        return []
    gone = set(text.splitlines()) - set(_text(project, "HEAD").splitlines())
    return [f"{len(gone)} lines that {FILE} had in {commit[:12]} are gone or changed in HEAD"] if gone else []


def _run_faults(client: MlflowClient, lineage: Lineage, step: Step, line: dict[str, Any]) -> Iterator[str]:
    for name, found in (("began", step.started), ("ended", step.ended)):
        sealed = line["started" if name == "began" else "ended"]
        if found != sealed:
            yield f"{step} {name} at {found} ms, sealed is {sealed}"
    yield from _differing(f"parameter {{}} of {step}", line["params"], _values(step.params, LONGEST_PARAM))
    kept = {key: value for key, value in step.tags.items() if key in line["tags"] or key.startswith(_OURS)}
    yield from _differing(f"tag {{}} of {step}", line["tags"], _values(kept))
    curves = {name: _curve(client, step.id, name) for name in step.metrics if not name.startswith("system/")}
    yield from _differing(f"metric {{}} of {step}", line["metrics"], curves, shown=False)
    yield from _differing(
        f"artifact {{}} of {step}", line["artifacts"], _artifacts(client, step.id, line["artifacts"]), shown=False
    )
    parent = lineage.parents.get(step.parent or "")
    if parent is not None and line["execution"] not in (parent.tags.get("journal.id"), f"pipeline-{parent.id}"):
        yield f"{step} was part of {line['execution']}, its parent run is of {parent.tags.get('journal.id', 'no execution')}"


def _parent_faults(client: MlflowClient, parent: Step, line: dict[str, Any]) -> Iterator[str]:
    if "journal.id" in parent.tags and parent.started != line["started"]:
        yield f"{parent} began at {parent.started} ms, sealed is {line['started']}"
    found = {key: value for key, value in parent.tags.items() if key in line["tags"]}
    yield from _differing(f"tag {{}} of {parent}", line["tags"], found)
    yield from _differing(
        f"artifact {{}} of {parent}", line["artifacts"], _artifacts(client, parent.id, line["artifacts"]), shown=False
    )


def _registered_faults(lineage: Lineage, sealed: dict[str, Any]) -> Iterator[str]:
    """Others may add tags; parameters and metrics are made once."""
    owners = {"version": lineage.version.tags} | ({"logged model": lineage.model.tags} if lineage.model else {})
    for owner, tags in owners.items():
        of_seal = {key: value for key, value in tags.items() if key in sealed.get("tags", {})}
        yield from _differing(f"tag {{}} of the {owner}", sealed.get("tags", {}), _values(of_seal))
    if lineage.model is not None:
        params = _values(lineage.model.params or {}, LONGEST_PARAM)
        yield from _differing("parameter {} of the logged model", sealed.get("params", {}), params)
        metrics = {metric.key: repr(float(metric.value)) for metric in lineage.model.metrics or []}
        yield from _differing("metric {} of the logged model", sealed.get("metrics", {}), metrics)


def _differing(words: str, sealed: Mapping[str, str], found: Mapping[str, str], *, shown: bool = True) -> Iterator[str]:
    for name in sorted(sealed.keys() | found.keys()):
        was, now = sealed.get(name, _ABSENT), found.get(name, _ABSENT)
        if was != now:
            how = f"is {now}, sealed is {was}" if shown or _ABSENT in (was, now) else "is not what was sealed"
            yield f"{words.format(name)} {how}"


def _values(entries: Mapping[str, str], longest: int | None = None) -> dict[str, str]:
    return {key: value_of(value, longest) if longest else value_of(value) for key, value in entries.items()}


def _curve(client: MlflowClient, run: str, name: str) -> str:
    return curve_hash((point.step, point.value) for point in client.get_metric_history(run, name))


def _artifacts(client: MlflowClient, run: str, sealed: Mapping[str, str]) -> dict[str, str]:
    """Hashes of the artifacts that the seal names, as MLflow has them; what it lacks is left out."""
    from mlflow.exceptions import MlflowException

    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sealed:
            try:
                found[name] = text_hash(Path(client.download_artifacts(run, name, folder)).read_bytes())
            except (MlflowException, OSError):
                continue
    return found
