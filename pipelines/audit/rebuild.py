"""Make a registered model again from its commit: the commands, and doing it in a temporary clone."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from pipelines.audit.blobs import Blobs
from pipelines.audit.checks import Check
from pipelines.audit.lineage import Lineage
from pipelines.audit.machine import difference, variables
from pipelines.audit.project import Project


def commands(lineage: Lineage, project: Project, blobs: Blobs) -> list[str]:
    """Shell commands, from a clone to the hash to compare; [] if the runs name no commit."""
    if not lineage.commits:
        return []
    packed, md5 = lineage.packed
    return [
        f"git clone {shlex.quote(str(project.root))} rebuilt && cd rebuilt",
        *[f"export {name}={value}" for name, value in variables(lineage).items()],
        *map(shlex.join, _commands_in_clone(lineage, project, blobs)),
        f"grep -A 3 'path: {packed}' dvc.lock  # md5: {md5}",
    ]


def rebuild(lineage: Lineage, project: Project, blobs: Blobs) -> Check:
    """Run the commands in a temporary clone and compare the packed model's hash; where it differs, name the first output
    that does. Takes as long as training."""
    from pipelines.run.checkout import environment

    if not lineage.commits:
        return Check("rebuild", "FAIL", "the runs name no commit, so there is nothing to rebuild from")
    stage, (packed, md5) = _stage(lineage), lineage.packed
    with tempfile.TemporaryDirectory(prefix="qvgen-audit-") as temporary:
        clone = Path(temporary) / "rebuilt"
        own = environment(project.root) | variables(lineage)
        own |= {"MLFLOW_TRACKING_URI": f"sqlite:///{clone / 'mlflow.db'}"}  # a rebuild is no run of the project
        for name in ("DVC_ROOT", "DVC_STAGE", "QVGEN_PARENT_RUN_ID", "QVGEN_EXECUTION"):
            own.pop(name, None)
        stderr = 2  # stdout is for the report
        get = ["git", "clone", "--quiet", str(project.root), str(clone)]
        for command in (get, *_commands_in_clone(lineage, project, blobs)):
            run = [sys.executable, "-m", *command] if command[0] == "dvc" else command
            folder = temporary if command is get else clone
            done = subprocess.run(run, cwd=folder, env=own, stdout=stderr)
            if done.returncode:
                return Check("rebuild", "FAIL", f"`{shlex.join(command)}` failed with exit code {done.returncode}; see above")
        made = _outputs(clone, lineage)
    found = made.get((stage, packed))
    if found == md5:
        return Check("rebuild", "PASS", f"{packed} was computed again from {lineage.commits[0][:12]}: the same bytes, {md5}")
    differing = [
        f"{path} of {step.stage}"
        for step in sorted(lineage.steps, key=lambda step: step.started)
        for path, value in step.outs.items()
        if made.get((step.stage, path), value) != value
    ]
    first = f", and {differing[0]} is the first output that differs" if differing else ""
    why = f"{difference(lineage)}; were it other packages, see environment"
    return Check("rebuild", "FAIL", f"{packed} became {found}, registered is {md5}{first}; {why}")


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


def _commands_in_clone(lineage: Lineage, project: Project, blobs: Blobs) -> list[list[str]]:
    """The clone shares DVC's cache for data that no stage makes, and where the cache lacks some, its remote, which the
    user may have configured for this checkout alone; `--force` computes everything else anew."""
    commands = [
        ["git", "checkout", "--quiet", lineage.commits[0]],
        ["dvc", "cache", "dir", "--local", str(_cache_dir(Path(blobs.cache.path)))],
    ]
    if sources := _sources(lineage, project):
        pull = blobs.remote is not None and not all(map(blobs.in_cache, sources.values()))
        own = project.root / ".dvc" / "config.local"
        if pull and own.is_file():
            commands.insert(1, ["cp", str(own), ".dvc/"])
        commands.append(["dvc", "pull" if pull else "checkout", *sources])
    return [*commands, ["dvc", "repro", "--force", _stage(lineage)]]


def _sources(lineage: Lineage, project: Project) -> dict[str, str]:
    """Path -> hash of data that `dvc add` put into the cache: a clone has only their .dvc files."""
    outs = {step.id: project.at(step.commit or "").outs for step in lineage.steps if project.has_commit(step.commit or "")}
    found = {
        path: md5
        for step in lineage.steps
        for path, md5 in step.deps.items()
        if (kept := outs.get(step.id, {}).get(path)) and kept.source
    }
    return dict(sorted(found.items()))


def _stage(lineage: Lineage) -> str:
    """The stage that wrote the packed model: stage pack."""
    packed = lineage.packed
    return next((step.stage for step in lineage.steps if packed in step.outs.items()), "pack")


def _cache_dir(cache: Path) -> Path:
    """DVC's cache folder; `cache` is that of MD5 hashes inside it, <folder>/files/md5."""
    return cache.parents[1] if cache.parts[-2:] == ("files", "md5") else cache
