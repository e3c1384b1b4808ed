"""The local record of a run: one file of JSON lines, written before anything goes to MLflow.

Nothing a stage reports can be lost or slowed down by tracking: a stage only appends lines here, and another process
(stages/record/sender.py) sends them on. Each line is complete when `write` returns, so `kill -9` costs nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stages.record.system import SystemMonitor

Status = Literal["FINISHED", "FAILED", "KILLED"]
FOLDER = Path(".qvgen") / "journal"
LAST = ("end", "closed")  # events after which nothing comes: of a stage's journal, of an execution's
MAX_DIFF = 1_000_000  # characters of uncommitted changes that are kept
FINISH_SECONDS = 60  # how long a stage that is done waits for tracking to catch up
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "fish", "ksh"})


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return time.time_ns() // 1_000_000


@dataclass
class Journal:
    """Append-only record of one stage run. `id` is the file's name and the tag `journal.id` of the MLflow run."""

    path: Path
    _waiting: list[str] = field(default_factory=list, repr=False)  # lines that found no room
    _ended: bool = field(default=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def create(cls, home: Path, name: str, pipeline: str, *, tags: Mapping[str, str], params: Mapping[str, Any]) -> Journal:
        id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{name}-{uuid.uuid4().hex[:8]}"
        journal = cls(home / FOLDER / f"{id}.jsonl")
        fields = {"id": id, "name": name, "pipeline": pipeline, "tags": dict(tags), "params": dict(params)}
        journal.write("start", pid=os.getpid(), **fields)
        return journal

    @property
    def id(self) -> str:
        return self.path.stem

    def write(self, event: str, **fields: Any) -> None:
        """Append one line, unless the run has ended. A full disk never stops the stage: it is said once, and what found no
        room is written as soon as there is some."""
        line = json.dumps({"event": event, "time": now(), **fields}, default=str)
        with self._lock:  # the system metrics come from a thread of their own
            if not self._ended:
                self._ended = event in LAST
                self._append([line])

    def flush(self) -> bool:
        """Try again to write what found no room. Returns whether all is written."""
        with self._lock:
            return not self._waiting or self._append([])

    def _append(self, lines: list[str]) -> bool:
        # A line that was cut short for lack of room ends with the first newline; a reader skips it.
        text = "\n".join(["", *self._waiting, *lines] if self._waiting else lines) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(text)
            self._waiting.clear()
        except OSError as error:
            if not self._waiting:
                print(f"warning: {self.path} cannot be written ({error}); the run goes on", file=sys.stderr)
            self._waiting += lines
        return not self._waiting

    def end(self, status: Status) -> None:
        self.write("end", status=status)

    def wait_for(self, entry: str, timeout: float = FINISH_SECONDS) -> Any:
        """An entry of the receipt, once the forwarder has written it; None if tracking does not answer in time."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            receipt = read_receipt(self.path)
            if receipt.get(entry) or receipt.get("failed"):
                return receipt.get(entry)
            time.sleep(0.1)
        return None


def read_events(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Complete lines from byte `offset` on, and the offset after them. A line cut short by a crash is left out."""
    with path.open("rb") as file:
        file.seek(offset)
        whole, _, _ = file.read().rpartition(b"\n")
    events = []
    for line in whole.splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:  # cut by a crash or a full disk; what follows is whole again
            continue
    return events, offset + len(whole) + bool(whole)


def receipt_path(journal: Path) -> Path:
    return journal.with_suffix(".run")


def read_receipt(journal: Path) -> dict[str, Any]:
    """What the forwarder has done with a journal so far: run_id, parent_run_id, registered,
    complete, tracking_uri, failed."""
    try:
        return json.loads(receipt_path(journal).read_text())
    except FileNotFoundError:
        return {}


def write_receipt(journal: Path, receipt: Mapping[str, Any]) -> None:
    draft = receipt_path(journal).with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(receipt))
    draft.replace(receipt_path(journal))


class Forwarder:
    """Context manager around a stage: a process of its own sends the journal to MLflow while the stage works; a thread adds
    system metrics to it.

    MLflow takes seconds to import and may hang or fail; here it can do neither to the stage.
    """

    def __init__(self, journal: Journal, home: Path) -> None:
        self._journal, self._home = journal, home
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: SystemMonitor | None = None

    def __enter__(self) -> Forwarder:
        command = [sys.executable, "-m", "stages.record.sender", str(self._journal.path), "--follow", str(os.getpid())]
        try:
            # A session of its own, so that Ctrl-C reaches the stage and the forwarder can still report how it ended.
            # In `home`, because `dvc exp run --temp` deletes the stage's own folder when it is done.
            self._process = subprocess.Popen(
                command, cwd=self._home, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
        except OSError as error:
            print(f"warning: tracking did not start ({error}); the journal is complete", file=sys.stderr)
        self._monitor = SystemMonitor(self._journal)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._monitor is not None:
            self._monitor.stop()
        if self._process is None:
            return
        ends = time.monotonic() + (FINISH_SECONDS if error is None else FINISH_SECONDS / 4)
        try:
            while not self._journal.flush() and time.monotonic() < ends:
                time.sleep(1)
            self._process.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            print("tracking is slow; it catches up in the background", file=sys.stderr)
        except KeyboardInterrupt:  # impatience with tracking must not fail a stage that is done
            pass


@dataclass(frozen=True)
class Pipeline:
    """One execution of the pipeline: the parent of its stages' runs."""

    id: str
    git_tags: dict[str, str]


def open_pipeline(root: Path, home: Path, token: str | None = None) -> Pipeline:
    """The execution this process belongs to; the first stage of an execution writes its journal.

    It is the one of that token, else the run that QVGEN_PARENT_RUN_ID names, else the `dvc` process that started this stage,
    else this process.
    """
    given = None if token else os.environ.get("QVGEN_PARENT_RUN_ID")
    id = f"pipeline-{token or given or _execution_token()}"
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
                draft.write_text(json.dumps(start) + "\n")
                os.link(draft, path)  # fails where a stage that runs beside this one was first
            except FileExistsError:
                pass
            finally:
                draft.unlink(missing_ok=True)
        return Pipeline(id, read_events(path)[0][0]["tags"])
    except OSError as error:
        print(f"warning: {path} cannot be written ({error})", file=sys.stderr)
        return Pipeline(id, {})


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
    """Commit, and whether anything else differs from it than what the pipeline itself writes while it runs."""
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
        texts["uncommitted.diff"] = difference[:MAX_DIFF] + (f"\nuntracked:\n{untracked}\n" if untracked else "\n")
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
