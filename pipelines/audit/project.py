"""The project as git and DVC have it at any commit, read without checking it out."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from stages.runtime.code import code_fingerprints
from stages.runtime.dvc import flatten, open_project, stage_address
from stages.runtime.source import is_code, summarize

WORKTREE = ""  # in place of a commit: the files that are checked out


@dataclass(frozen=True)
class Kept:
    """How DVC keeps an output, as dvc.yaml or a .dvc file of some commit says."""

    cached: bool  # in DVC's cache; else git keeps the file
    source: bool  # added by `dvc add`: no stage makes it
    always: bool  # of a stage that runs every time, such as a description of the machine: kept nowhere
    md5: str | None  # as dvc.lock or the .dvc file has it


@dataclass
class Snapshot:
    """DVC's view of one commit."""

    outs: dict[str, Kept]
    code: dict[tuple[str, str], str | None]  # (stage, dependency that no stage makes) -> hash of git's content
    commands: dict[str, str]  # stage -> its command


@dataclass
class Project:
    """The checkout `root`; answers about commits are remembered."""

    root: Path
    _snapshots: dict[str, Snapshot] = field(default_factory=dict, repr=False)
    _code: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)

    def git(self, *command: str) -> str | None:
        """Output of a git command without the last newline; None if it fails."""
        done = self._git(*command)
        return done.stdout.decode(errors="replace").rstrip("\n") if done.returncode == 0 else None

    def show(self, commit: str, path: str) -> bytes | None:
        """Content of a file at a commit or in WORKTREE; None if it is not there. `path` is relative to the project."""
        if commit == WORKTREE:
            return (self.root / path).read_bytes() if (self.root / path).is_file() else None
        done = self._git("show", f"{commit}:./{path}")
        return done.stdout if done.returncode == 0 else None

    def has_commit(self, commit: str) -> bool:
        return bool(commit) and self.git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}") is not None

    def is_kept(self, commit: str) -> bool:
        """Whether a branch, a tag or HEAD leads to the commit."""
        if self.git("merge-base", "--is-ancestor", commit, "HEAD") is not None:
            return True
        return bool(self.git("for-each-ref", "--count=1", "--contains", commit))

    def later_commits(self, commit: str, path: str) -> list[str]:
        """Commits of any branch or tag that come after `commit` and change `path`, the oldest first."""
        listed = self.git("log", "--format=%H", "--reverse", "--ancestry-path", "--all", f"^{commit}", "--", path)
        return (listed or "").split()

    def lock_entry(self, commit: str, stage: str) -> dict[str, Any] | None:
        """The entry of a stage ("name" or "folder/dvc.yaml:name") in dvc.lock at that commit; None if there is none."""
        file, _, name = stage.rpartition(":")
        content = self.show(commit, str(Path(file).with_name("dvc.lock")) if file else "dvc.lock")
        if content is None:
            return None
        with suppress(yaml.YAMLError, AttributeError):
            return (yaml.safe_load(content) or {}).get("stages", {}).get(name)
        return None

    def params(self, commit: str, files: list[str]) -> dict[str, str]:
        """Parameters of files at a commit as runs record them: dotted name -> text."""
        from dvc.utils.serialize import parse_yaml

        found: dict[str, str] = {}
        for file in files:
            content = self.show(commit, file)
            tree = {} if content is None else parse_yaml(content.decode(), file)
            found |= {key: str(value) for key, value in flatten(tree or {}).items()}
        return found

    def at(self, commit: str) -> Snapshot:
        """Outputs and code of a commit. Raises ValueError for a dvc.yaml that DVC cannot read."""
        from dvc.exceptions import DvcException

        if commit not in self._snapshots:
            try:
                self._snapshots[commit] = self._read(commit)
            except DvcException as error:
                raise ValueError(f"DVC cannot read dvc.yaml of commit {commit[:12]}: {error}") from error
        return self._snapshots[commit]

    def _read(self, commit: str) -> Snapshot:
        from dvc.repo import Repo

        with Repo(str(self.root), rev=commit) as repo:
            stages = list(repo.index.stages)
            outs = {
                _path(repo, out): Kept(
                    bool(out.use_cache),
                    stage.is_data_source,
                    stage.always_changed,
                    out.hash_info.value if out.hash_info else None,
                )
                for stage in stages
                for out in stage.outs
            }
            hashes = _Hashes()
            code = {
                (stage_address(stage), dep.def_path): hashes[dep]
                for stage in stages
                for dep in stage.deps
                if not hasattr(dep, "read_params") and _path(repo, dep) not in outs
            }
            commands = {stage_address(stage): str(stage.cmd) for stage in stages if not stage.is_data_source}
        return Snapshot(outs, code, commands)

    def code(self, commit: str) -> dict[str, str]:
        """Parameter -> fingerprint of the code that each stage can reach at a commit, as stage observe writes them."""
        if commit not in self._code:
            blobs = self._blobs(commit)
            sources = {path: _summary(path, content) for path, content in blobs.items()}
            scripts = [Path(path) for path in blobs if path.startswith("stages/") and path.count("/") == 1]
            stages = [path.stem for path in scripts if path.stem not in ("__init__", "observe")]
            found = code_fingerprints(sources.__getitem__, list(blobs), stages)
            self._code[commit] = {f"code.{stage}": value for stage, value in found.items()}
        return self._code[commit]

    def _blobs(self, commit: str) -> dict[str, bytes]:
        """Path -> content of the source files of a commit, in two commands."""
        listed = (line.partition("\t") for line in (self.git("ls-tree", "-r", commit) or "").splitlines())
        ids = {path: about.split()[2] for about, _, path in listed if is_code(path)}  # about: mode, type, id
        done = self._git("cat-file", "--batch", input="\n".join(ids.values()).encode())
        found, rest = {}, done.stdout
        for path in ids:
            header, _, rest = rest.partition(b"\n")
            size = int(header.split()[2])
            found[path], rest = rest[:size], rest[size + 1 :]
        return found

    def _git(self, *command: str, input: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        # `git replace` puts another object in the place of a commit, for every command but not for a clone.
        variables = os.environ | {"GIT_NO_REPLACE_OBJECTS": "1"}
        try:
            return subprocess.run(["git", *command], cwd=self.root, capture_output=True, input=input, env=variables)
        except FileNotFoundError:
            raise ValueError("no git on the PATH, which holds what the record is held against: install it") from None


_summary = cache(summarize)


def _path(repo: Any, item: Any) -> str:
    """Of an output or dependency, relative to the project: a .dvc file in a folder names it relative to that folder."""
    return repo.fs.relpath(str(item.fs_path), repo.root_dir)


class _Hashes:
    """DVC's hashes of dependencies, each path once: many stages share a folder."""

    def __init__(self) -> None:
        self._known: dict[str, str | None] = {}

    def __getitem__(self, dep: Any) -> str | None:
        path = str(dep.fs_path)
        if path not in self._known:
            try:
                self._known[path] = dep.get_hash().value
            except FileNotFoundError:  # not in git at that commit
                self._known[path] = None
        return self._known[path]


def current_hash(root: Path, path: str) -> str:
    """DVC's hash of a dependency or output as it is now, or as dvc.lock has it if it is not checked out.

    Raises ValueError if no stage and no .dvc file names `path`.
    """
    wanted = str(Path(path)).removeprefix("./").rstrip("/")
    with open_project(root) as repo:
        named = [item for stage in repo.index.stages for item in [*stage.outs, *stage.deps] if _path(repo, item) == wanted]
        for item in named:
            if item.exists:
                return item.get_hash().value
        for item in named:
            if item.hash_info:
                return item.hash_info.value
    raise ValueError(f"{path}: no dvc.yaml and no .dvc file names it, so it has no DVC hash; give a path as dvc.yaml has it")
