"""One execution of the pipeline, such as a `dvc repro`: its circumstances, and how a stage finds the one it belongs to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.record.journal import FOLDER, now, open_private, read_events
from stages.record.secrets import redacted

PREFIX = "pipeline-"  # of the ids and journals of executions
MAX_DIFF = 1_000_000  # characters of uncommitted changes that are kept
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "fish", "ksh"})


@dataclass(frozen=True)
class Execution:
    """One execution of the pipeline: the parent of its stages' runs."""

    id: str
    git_tags: dict[str, str]


def open_execution(root: Path, home: Path, token: str | None = None) -> Execution:
    """The execution this process belongs to; the first stage of an execution writes its journal.

    An execution is named by the token QVGEN_EXECUTION, else by the run QVGEN_PARENT_RUN_ID, else by the `dvc` process that
    started this stage, else by this process.
    """
    given = None if token else os.environ.get("QVGEN_PARENT_RUN_ID")
    id = f"{PREFIX}{token or given or _execution_token()}"
    path = home / FOLDER / f"{id}.jsonl"
    try:
        if not path.exists():
            git_tags = _git_tags(root)
            name = f"pipeline {git_tags.get('git.commit', '')[:8]}".strip()
            start = {"event": "start", "time": now(), "id": id, "name": name, "run_id": given}
            start["tags"] = git_tags | ({"dvc.exp_name": os.environ["DVC_EXP_NAME"]} if "DVC_EXP_NAME" in os.environ else {})
            start["texts"] = _circumstances(root, dirty=git_tags.get("git.dirty") == "true")
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{os.getpid()}")
            try:
                with open_private(draft) as file:
                    file.write(json.dumps(start) + "\n")
                os.link(draft, path)  # fails where a stage that runs beside this one was first
            except FileExistsError:
                pass
            finally:
                draft.unlink(missing_ok=True)
        return Execution(id, read_events(path)[0][0]["tags"])
    except OSError as error:
        print(f"warning: {path} cannot be written ({error})", file=sys.stderr)
        return Execution(id, {})


def _execution_token() -> str:
    """Process id and start time of the `dvc` command above this process: equal for all stages it starts.

    Several `dvc` commands that belong together share the token QVGEN_EXECUTION.
    """
    import psutil

    if given := os.environ.get("QVGEN_EXECUTION"):
        return given

    parents = list(_ancestors())
    under_dvc = [p for p in parents if any(Path(part).name == "dvc" for part in p.cmdline()[:3])]
    if not under_dvc and "DVC_STAGE" in os.environ:  # DVC called as a library
        under_dvc = [p for p in parents if p.name() not in _SHELLS]
    process = under_dvc[0] if under_dvc else psutil.Process()
    return f"{process.pid}-{int(process.create_time() * 1000)}"


def _ancestors() -> Iterator[Any]:
    import psutil

    for process in psutil.Process().parents():
        try:
            process.cmdline()
        except psutil.Error:
            return
        yield process


# What the pipeline itself writes while it runs.
_WRITTEN = [f":(exclude,glob){path}" for path in ("**/dvc.lock", "metrics/**", "reports/**")]


def _git_tags(root: Path) -> dict[str, str]:
    """Commit, and whether files differ from it other than those that the pipeline itself writes while it runs."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {}
    changes = _git(root, "--no-optional-locks", "status", "--porcelain", "--", ".", *_WRITTEN)
    return {"git.commit": commit, "git.dirty": "true" if changes else "false"}


def _circumstances(root: Path, dirty: bool) -> dict[str, str]:
    """Texts that say what an execution ran with: the pipeline's files, the packages, the machine, what is not committed."""
    import platform
    from importlib.metadata import distributions

    texts = {name: (root / name).read_text() for name in ("params.yaml", "dvc.yaml", "dvc.lock") if (root / name).is_file()}
    packages = {f"{d.metadata['Name']}=={d.version}" for d in distributions()}
    texts["environment.txt"] = "\n".join([f"# Python {platform.python_version()}", *sorted(packages, key=str.lower)]) + "\n"
    cpu = next((x for x in _read("/proc/cpuinfo").splitlines() if x.startswith("model name")), "").partition(": ")[2]
    texts["machine.txt"] = f"{platform.platform()}\n{cpu}\n{os.cpu_count()} cores\n"
    if dirty:
        difference = _git(root, "--no-optional-locks", "diff", "HEAD", "--", ".", *_WRITTEN) or ""
        untracked = _git(root, "ls-files", "--others", "--exclude-standard") or ""
        texts["uncommitted.diff"] = redacted(difference[:MAX_DIFF]) + (f"\nuntracked:\n{untracked}\n" if untracked else "\n")
    return texts


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _git(root: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
