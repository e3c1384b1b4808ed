"""Make a registered model again from its commit: the commands, and doing it in a temporary clone."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from pipelines.audit_checks import Check
from pipelines.audit_lineage import Lineage
from pipelines.audit_project import Project


def commands(lineage: Lineage, project: Project, cache: Path) -> list[str]:
    """Shell commands, from a clone to the hash to compare; [] if the runs name no commit.

    The clone shares DVC's cache for data that no stage makes; `--force` computes everything else anew.
    """
    if not lineage.commits:
        return []
    stage, (packed, md5) = _stage(lineage), lineage.packed
    sources = " ".join(map(shlex.quote, _sources(lineage, project)))
    return [
        f"git clone {shlex.quote(str(project.root))} rebuilt && cd rebuilt",
        f"git checkout {lineage.commits[0]}",
        f"dvc cache dir --local {shlex.quote(str(_cache_dir(cache)))}",
        *([f"dvc checkout {sources}"] if sources else []),
        f"dvc repro --force {stage}",
        f"grep -A 3 'path: {packed}' dvc.lock  # md5: {md5}",
    ]


def rebuild(lineage: Lineage, project: Project, cache: Path) -> Check:
    """Run the commands in a temporary clone and compare the packed model's hash; where it differs, name the first output
    that does. Takes as long as training."""
    from pipelines.checkout import environment

    if not lineage.commits:
        return Check("rebuild", False, "the runs name no commit, so there is nothing to rebuild from")
    stage, (packed, md5) = _stage(lineage), lineage.packed
    sources = _sources(lineage, project)
    with tempfile.TemporaryDirectory(prefix="qvgen-audit-") as temporary:
        clone = Path(temporary) / "rebuilt"
        dvc = [sys.executable, "-m", "dvc"]
        variables = environment(project.root)
        variables |= {"MLFLOW_TRACKING_URI": f"sqlite:///{clone / 'mlflow.db'}"}  # a rebuild is no run of the project
        for name in ("DVC_ROOT", "DVC_STAGE", "QVGEN_PARENT_RUN_ID", "QVGEN_EXECUTION"):
            variables.pop(name, None)
        stderr = 2  # stdout is for the report
        for command, folder in (
            (["git", "clone", "--quiet", str(project.root), str(clone)], Path(temporary)),
            (["git", "checkout", "--quiet", lineage.commits[0]], clone),
            ([*dvc, "cache", "dir", "--local", str(_cache_dir(cache))], clone),
            *([([*dvc, "checkout", *sources], clone)] if sources else []),
            ([*dvc, "repro", "--force", stage], clone),
        ):
            done = subprocess.run(command, cwd=folder, env=variables, stdout=stderr)
            if done.returncode:
                return Check("rebuild", False, f"`{shlex.join(command)}` failed with exit code {done.returncode}; see above")
        made = _outputs(clone, lineage)
    found = made.get((stage, packed))
    if found == md5:
        return Check("rebuild", True, f"{packed} was computed again from {lineage.commits[0][:12]}: the same bytes, {md5}")
    differing = [
        f"{path} of {step.stage}"
        for step in sorted(lineage.steps, key=lambda step: step.started)
        for path, value in step.outs.items()
        if made.get((step.stage, path), value) != value
    ]
    first = f", and {differing[0]} is the first output that differs" if differing else ""
    why = "was it another processor or other packages? see environment"
    return Check("rebuild", False, f"{packed} became {found}, registered is {md5}{first}; {why}")


def _outputs(clone: Path, lineage: Lineage) -> dict[tuple[str, str], str]:
    """(stage, path) -> hash, as the clone's dvc.lock has it after the rebuild."""
    import yaml

    found: dict[tuple[str, str], str] = {}
    for stage in {step.stage for step in lineage.steps}:
        file, _, name = stage.rpartition(":")
        lock = clone / (Path(file).with_name("dvc.lock") if file else "dvc.lock")
        entries = (yaml.safe_load(lock.read_text()) if lock.is_file() else {}).get("stages", {}).get(name, {})
        found |= {(stage, item["path"]): item.get("md5") for item in entries.get("outs", [])}
    return found


def _sources(lineage: Lineage, project: Project) -> list[str]:
    """Data that `dvc add` put into the cache: a clone has only their .dvc files."""
    outs = {step.id: project.at(step.commit or "").outs for step in lineage.steps if project.has_commit(step.commit or "")}
    return sorted({p for step in lineage.steps for p in step.deps if (kept := outs.get(step.id, {}).get(p)) and kept.source})


def _stage(lineage: Lineage) -> str:
    """The stage that wrote the packed model: stage pack."""
    packed = lineage.packed
    return next((step.stage for step in lineage.steps if packed in step.outs.items()), "pack")


def _cache_dir(cache: Path) -> Path:
    """DVC's cache folder; `cache` is that of MD5 hashes inside it, <folder>/files/md5."""
    return cache.parents[1] if cache.parts[-2:] == ("files", "md5") else cache
