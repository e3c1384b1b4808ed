"""`qvgen audit`: from a version in the model registry to data, code, parameters and environment, every claim checked.

Reads only; `--rebuild` works in a temporary clone. `--uses` asks the other way round: which versions used this data?
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.audit.blobs import open_blobs
from pipelines.audit.checks import COMMIT, Check, git_checks, lock_check, registry_checks
from pipelines.audit.data import data_checks, environment_check, workspace_check
from pipelines.audit.lineage import Lineage, Runs, read_lineage, uses
from pipelines.audit.machine import machine_check
from pipelines.audit.project import Project, current_hash
from pipelines.audit.rebuild import commands, rebuild
from pipelines.audit.seal import promotion_check, seal_check
from pipelines.audit.signature import signature_check
from pipelines.audit.slsa import statement
from pipelines.audit.uploaded import canary_check, uploaded_check
from pipelines.champion.promote import CHAMPION
from pipelines.champion.registry import find_model, find_version, open_registry
from qvgen.hub.promotions import promotions

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

_HASH = re.compile(r"[0-9a-f]{32}(\.dir)?")


@dataclass(frozen=True)
class Report:
    """The findings of an audit. `rebuild`: shell commands that make the packed model again."""

    model: str
    checks: list[Check]
    rebuild: list[str]
    provenance: dict[str, Any] | None = field(default=None, repr=False)  # of slsa.py, if it was asked for

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def exit_code(self) -> int:
        """0: every claim holds. 1: one does not. 2: one will once results are committed. 3: this checkout is another model."""
        states = {check.state for check in self.checks}
        return next((code for state, code in (("FAIL", 1), ("TODO", 2), ("WARN", 3)) if state in states), 0)

    def as_dict(self) -> dict[str, Any]:
        checks = [asdict(check) | {"ok": check.ok} for check in self.checks]
        return {"ok": self.ok, "exit_code": self.exit_code, "checks": checks, "rebuild": self.rebuild}

    def __str__(self) -> str:
        lines = [self.model, *map(str, self.checks), f"{self.model}: {self._verdict()}"]
        return "\n".join([*lines, *(["", "To rebuild it:", *self.rebuild] if self.rebuild else [])])

    def _verdict(self) -> str:
        count = {state: sum(check.state == state for check in self.checks) for state in ("FAIL", "TODO", "WARN")}
        total = len(self.checks)
        if count["FAIL"]:
            return f"{count['FAIL']} of {total} checks FAIL"
        if count["TODO"]:
            return f"nothing fails, but {count['TODO']} of {total} checks wait for the results to be committed: {COMMIT}"
        if count["WARN"]:
            return f"what was recorded passes, but this checkout has another model ({count['WARN']} of {total} checks WARN)"
        return f"all {total} checks pass"


@dataclass(frozen=True)
class Use:
    """A model version whose lineage read some data."""

    model: str
    aliases: list[str]
    stages: list[str]
    path: str


def audit(
    home: Path, reference: str, *, rebuild_too: bool = False, signers: Path | None = None, provenance: bool = False
) -> Report:
    """Every check on the version that `reference` (NAME@ALIAS or NAME/VERSION) names. `signers`: an allowed_signers file that
    counts instead of the repository's. With `provenance` the report has a SLSA statement.

    Raises ValueError for another form of reference, for what the registry does not have, if MLflow does not answer, and for a
    dvc.yaml that DVC cannot read.
    """
    name, alias, number = _parse(reference)
    project, checks = Project(home), []
    with open_registry(home, reading=True) as client:
        model = find_model(client, name)
        if alias is not None:
            checks.append(_alias_check(client, model, alias))
            if alias not in model.aliases:
                return Report(reference, checks, [])
        lineage = _lineage(client, find_version(client, name, number, alias or ""), {})
        texts = _texts(client, lineage)
        title = f"{name} version {lineage.version.version}"
        checks += registry_checks(lineage)
        if lineage.source is None:
            return Report(title, checks, [])
        checks += [uploaded_check(client, lineage), canary_check(lineage)]
        checks += git_checks(lineage, project)
        check, lock_commit = lock_check(lineage, project)
        checks += [check, seal_check(client, lineage, project, lock_commit)]
        promoted = None
        if alias == CHAMPION and (history := promotions(client, name, alias)):
            checks.append(promotion_check(project, name, alias, history[-1], lock_commit))
            promoted = (f"{name}@{alias}", history[-1])
        checks.append(signature_check(project, lineage, promoted, lock_commit, signers))
    with open_blobs(home) as blobs:
        checks += data_checks(lineage, project, blobs, lock_commit)
        checks += [environment_check(lineage, project, texts), machine_check(lineage)]
        checks.append(workspace_check(lineage, project, blobs))
        if rebuild_too:
            checks.append(rebuild(lineage, project, blobs))
        stated = statement(lineage, project) if provenance else None
        return Report(title, checks, commands(lineage, project, blobs), stated)


def find_uses(home: Path, data: str) -> tuple[str, list[Use]]:
    """The DVC hash of `data` (a hash, or a path that dvc.yaml names) and the versions of all models that used it.

    Raises ValueError for a path that DVC does not know, and if MLflow does not answer.
    """
    md5 = data if _HASH.fullmatch(data) else current_hash(home, data)
    found: list[Use] = []
    runs: dict[str, Runs] = {}
    with open_registry(home, reading=True) as client:
        for model in client.search_registered_models():
            for version in client.search_model_versions(f"name = '{model.name}'"):
                if steps := uses(_lineage(client, version, runs), md5):
                    number = int(version.version)
                    aliases = sorted(alias for alias, value in model.aliases.items() if int(value) == number)
                    stages = list(dict.fromkeys(step.stage for step, _ in steps))
                    found.append(Use(f"{model.name}/{number}", aliases, stages, steps[0][1]))
    return md5, found


def _parse(reference: str) -> tuple[str, str | None, int | None]:
    if match := re.fullmatch(r"([^@/]+)@([^@/]+)", reference):
        return match[1], match[2], None
    if match := re.fullmatch(r"([^@/]+)/v?(\d+)", reference):
        return match[1], None, int(match[2])
    raise ValueError(f"{reference!r} names no model version: give NAME@ALIAS, such as qvgen@champion, or NAME/VERSION")


def _alias_check(client: MlflowClient, model: RegisteredModel, alias: str) -> Check:
    version, history = model.aliases.get(alias), promotions(client, model.name, alias)
    if version is None:
        known = ", ".join(sorted(model.aliases)) or "none"
        return Check("alias", "FAIL", f"{model.name} has no alias {alias} (it has: {known}); `qvgen promote` sets champion")
    if not history:
        return Check("alias", "FAIL", f"{alias} is version {version}, but no promotion is recorded; use `qvgen promote`")
    newest = history[-1]
    if newest.version != int(version):
        moved = f"{alias} is version {version}, the newest record (number {len(history)}) says {newest.version}"
        return Check("alias", "FAIL", f"{moved}: moved by hand, or cut short; `qvgen promote` decides and records")
    how = f"forced by {newest.by}" if newest.forced else f"set by {newest.by}"
    return Check("alias", "PASS", f"{alias} is version {version}, {how}: {newest.reason} (record {len(history)})")


def _lineage(client: MlflowClient, version: ModelVersion, runs: dict[str, Runs]) -> Lineage:
    """`runs`: experiments read so far, by id."""
    from mlflow.exceptions import MlflowException

    from stages.record.connection import EXPERIMENT

    try:
        experiment = client.get_run(version.run_id or "").info.experiment_id
    except MlflowException:  # the run is gone; the checks say so
        found = client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else ""
    if experiment not in runs:
        runs[experiment] = Runs(client, experiment)
    return read_lineage(client, version, runs[experiment])


def _texts(client: MlflowClient, lineage: Lineage) -> dict[str, str]:
    """environment.txt of the registering run's parent, if it recorded one."""
    parent = lineage.source.parent if lineage.source else None
    run = lineage.parents.get(parent or "")
    if run is None or run.deleted:
        return {}
    names = [file.path for file in client.list_artifacts(run.id) if file.path == "environment.txt"]
    with tempfile.TemporaryDirectory() as folder:
        return {name: Path(client.download_artifacts(run.id, name, folder)).read_text() for name in names}
