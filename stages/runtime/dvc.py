"""DVC's view of the running stage: command, dependencies, parameters, outputs, and the key made of them."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

READ_ATTEMPTS, READ_SECONDS = 10, 0.3


@dataclass(frozen=True)
class DvcFacts:
    """One stage of dvc.yaml as it stands now in the workspace (dvc.lock is written only after the stage)."""

    address: str  # stage name, with @item for a matrix stage, after the dvc.yaml it stands in unless that is the root's
    command: str
    deps: dict[str, str]  # path -> DVC hash of what lies there now
    params: dict[str, Any]  # dotted name -> value
    outs: tuple[str, ...]

    @property
    def name(self) -> str:
        """The address without the dvc.yaml, fit for a file name."""
        return self.address.rpartition(":")[2]

    @property
    def tags(self) -> dict[str, str]:
        """The tags by which the run is found in MLflow."""
        return {"dvc.stage": self.address, "dvc.key": self.key} | {f"dvc.dep.{path}": md5 for path, md5 in self.deps.items()}

    @property
    def key(self) -> str:
        """`<stage>-<hash>`: the same for the same command, dependencies and parameters, and for nothing else."""
        return f"{self.name}-{fingerprint([self.command, self.deps, self.params])[:16]}"


def fingerprint(content: Any) -> str:
    """sha256 of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def read_dvc_facts(root: Path, address: str) -> DvcFacts:
    """Read dvc.yaml and hash the dependencies (DVC remembers the hashes of unchanged files).

    Raises ValueError for a stage that dvc.yaml does not have, FileNotFoundError for a missing dependency, and DVC's own
    error for a folder that is no DVC project.
    """
    with _opened(root, address) as stage:
        deps: dict[str, str] = {}
        params: dict[str, Any] = {}
        for dep in stage.deps:
            if hasattr(dep, "read_params"):
                params |= flatten(dep.read_params())
            elif dep.exists:
                deps[dep.def_path] = dep.get_hash().value
            else:
                raise FileNotFoundError(
                    f"{dep.def_path} does not exist; `dvc repro {address}` makes what {address} depends on"
                )
        return DvcFacts(stage_address(stage), str(stage.cmd), deps, params, tuple(out.def_path for out in stage.outs))


def output_hashes(root: Path, facts: DvcFacts) -> dict[str, str]:
    """Path -> DVC hash of each output of the stage. DVC finds them again in its state when it commits the stage."""
    with _opened(root, facts.address) as stage:
        return {o.def_path: o.get_hash().value for o in stage.outs if o.exists}


def restore_outputs(root: Path, facts: DvcFacts) -> None:
    """Bring the last good outputs back from DVC's cache: DVC deletes them before it runs a stage, and the stage failed.

    Metrics that git keeps are not in the cache and stay away.
    """
    with _opened(root, facts.address) as stage:
        for out in stage.outs:
            if out.use_cache and out.hash_info and not out.exists and not out.changed_cache():
                out.checkout()


def stage_address(stage: Any) -> str:
    """Of DVC's stage, as DVC writes it in the root; its own `addressing` is relative to the current folder."""
    if stage.is_data_source:  # a .dvc file, which has no name
        return stage.path_in_repo
    return stage.name if stage.path_in_repo == "dvc.yaml" else f"{stage.path_in_repo}:{stage.name}"


@dataclass(frozen=True)
class Stores:
    """Where DVC keeps bytes by their md5: the folder of this checkout's cache, and the address of the default remote."""

    cache: str
    remote: str | None


def read_stores(root: Path) -> Stores:
    """Of the project `root`, as DVC is configured here."""
    with open_project(root) as repo:
        name = repo.config["core"].get("remote")
        url = repo.config["remote"].get(name, {}).get("url") if name else None
        return Stores(str(repo.cache.local.path), str(url) if url else None)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


@contextmanager
def open_project(root: Path) -> Iterator[Any]:
    """DVC's Repo of a checkout. Of one that cannot be written, such as a colleague's or a mounted release, locks and temporary
    files lie in a folder that is deleted afterwards, and what DVC remembers of files too where its own place for it,
    /var/tmp/dvc, cannot be written either."""
    from dvc.repo import Repo

    if os.access(root / ".dvc", os.W_OK) and os.access(root, os.W_OK):
        with Repo(str(root)) as repo:
            yield repo
        return
    with tempfile.TemporaryDirectory(prefix="qvgen-dvc-") as folder:

        class ReadOnly(Repo):
            tmp_dir: Any = folder

            @cached_property
            def site_cache_dir(self) -> Any:
                """Another user may have made the usual place."""
                with suppress(OSError):
                    usual = Path(Repo.site_cache_dir.__get__(self, type(self)))
                    nearest = next(one for one in (usual, *usual.parents) if one.exists())
                    if all(os.access(one, os.W_OK) for one in (nearest, *usual.rglob("*"))):
                        return str(usual)
                return folder

            def _ignore(self) -> None:
                """Nothing to add to .gitignore."""

        with ReadOnly(str(root)) as repo:
            yield repo


@contextmanager
def _opened(root: Path, address: str) -> Iterator[Any]:
    """DVC's stage of that address.

    Another stage that ends at this moment rewrites dvc.lock in place, so that half of it may be read: then it is read again.
    """
    from dvc.exceptions import DvcException

    for attempt in range(READ_ATTEMPTS):
        with open_project(root) as repo:
            try:
                stage = _find(repo, address)
            except DvcException:
                if attempt == READ_ATTEMPTS - 1:
                    raise
                time.sleep(READ_SECONDS)
            else:
                yield stage
                return


def _find(repo: Any, address: str) -> Any:
    """The stage of that address, or the only one of that name, whichever dvc.yaml it stands in."""
    from dvc.stage.exceptions import StageFileDoesNotExistError, StageNotFound

    file, _, name = address.rpartition(":")
    with suppress(StageFileDoesNotExistError, StageNotFound):  # one file: the whole project takes seconds
        return repo.stage.load_one(str(Path(repo.root_dir) / (file or "dvc.yaml")), name)
    stages = {stage_address(stage): stage for stage in repo.index.stages}
    found = [stage for known, stage in stages.items() if known.endswith(f":{address}")]
    if len(found) != 1:
        close = difflib.get_close_matches(address, stages, n=5, cutoff=0.3)
        raise ValueError(f"no dvc.yaml has a stage {address!r}; close: {', '.join(close) or ', '.join(sorted(stages)[:5])}")
    return found[0]
