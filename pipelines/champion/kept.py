"""`qvgen gc`: bytes that a registered version needs and garbage collection would delete, in DVC's cache and in MLflow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.champion.registry import open_registry

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Loss:
    """Something that a version needs and a command would delete."""

    version: str
    aliases: list[str]
    what: str
    command: str

    def __str__(self) -> str:
        aliases = f" ({', '.join(self.aliases)})" if self.aliases else ""
        return f"{self.version}{aliases}: {self.command} would delete {self.what}"


def check_gc(home: Path, *, all_commits: bool = False, run: bool = False) -> list[Loss]:
    """Print what would be lost, and with `run` call `dvc gc` if nothing would. Returns the losses. Raises ValueError if MLflow
    does not answer."""
    scope = ["--all-commits"] if all_commits else ["--all-branches", "--all-tags"]
    losses = list(find_losses(home, scope))
    print("\n".join(map(str, losses)) or f"`dvc gc {' '.join(scope)}` and `mlflow gc` delete nothing that a version needs")
    if losses:
        print("nothing was deleted; delete a version in MLflow if it is not needed, or keep its results on a branch or tag")
    elif run:
        subprocess.run([sys.executable, "-m", "dvc", "gc", "--force", *scope], cwd=home, check=True)
    return losses


def find_losses(home: Path, scope: list[str]) -> Iterator[Loss]:
    """Of every version of every registered model."""
    with open_registry(home) as client:
        needed = [(model, version) for model in client.search_registered_models() for version in _versions(client, model.name)]
        used, cached = _in_dvc(home, scope)
        for model, version in needed:
            number = int(version.version)
            aliases = sorted(alias for alias, value in model.aliases.items() if int(value) == number)
            name, md5 = f"{model.name}/{number}", version.tags.get("dvc.md5", "")
            if md5 in cached and md5 not in used:
                yield Loss(
                    name, aliases, f"{version.tags.get('dvc.path')} ({md5}) from the cache", f"dvc gc {' '.join(scope)}"
                )
            if why := _deleted_in_mlflow(client, version):
                yield Loss(name, aliases, why, "mlflow gc")


def _versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    return list(client.search_model_versions(f"name = '{name}'"))


def _in_dvc(home: Path, scope: list[str]) -> tuple[set[str], set[str]]:
    """Hashes that `dvc gc` with this scope keeps (those of the workspace too), and those of folders in the cache."""
    from dvc.repo import Repo

    with Repo(str(home)) as repo:
        everything = "--all-commits" in scope
        kept = repo.used_objs(all_branches=not everything, all_tags=not everything, all_commits=everything)
        used = {found.value for group in kept.values() for found in group if found.value}
        return used, {oid for oid in repo.cache.local.all() if oid.endswith(".dir")}


def _deleted_in_mlflow(client: MlflowClient, version: ModelVersion) -> str | None:
    """What MLflow has marked as deleted, which its gc deletes for good."""
    from mlflow.exceptions import MlflowException

    scheme, _, id = (version.source or "").partition(":/")
    try:
        run = client.get_run(version.run_id) if version.run_id else None
        if run is not None and run.info.lifecycle_stage != "active":
            return f"its run {version.run_id}: `mlflow runs restore --run-id {version.run_id}` keeps it"
        if scheme == "models":
            client.get_logged_model(id)
    except MlflowException as error:
        return f"the files of logged model {id}" if error.error_code == "RESOURCE_DOES_NOT_EXIST" else None
    return None
