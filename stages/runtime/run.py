"""The frame that every stage runs in: parameters, outputs that appear whole or not at all, checkpoints, progress, a record.

A stage is a module with `def run(stage: Stage) -> None` that ends with `stage_main("name", run)`. It runs the same
under `dvc repro`, `dvc exp run` and by hand (`python -m stages.name` in the project folder).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from qvgen.params import Params, load_params
from qvgen.share import ALONE, Share
from stages.record.execution import open_execution
from stages.record.forwarder import Forwarder
from stages.record.journal import Journal, NoJournal
from stages.record.seal import seal_run
from stages.runtime.dvc import DvcFacts, output_hashes, read_dvc_facts, restore_outputs
from stages.runtime.outputs import write_whole
from stages.runtime.usage import out_of_memory, summary

if TYPE_CHECKING:
    import torch

NO_ROOM = 1_000_000  # bytes left on a disk that is called full


@dataclass(frozen=True)
class Stage:
    """One run of one stage: what it may read, where it writes, and how it reports."""

    name: str
    params: Params
    root: Path  # the checkout that this run reads and writes (a copy under `dvc exp run --temp`)
    home: Path  # the checkout that keeps journals, checkpoints and mlflow.db
    facts: DvcFacts
    journal: Journal
    share: Share = ALONE
    bars: list[Progress] = field(default_factory=list)  # those begun, which tell the throughput

    @property
    def key(self) -> str:
        """Name of this stage with exactly this command, these dependencies and these parameters."""
        return self.facts.key

    @property
    def device(self) -> torch.device:
        """Where this stage computes. Raises ValueError for a device that is not there."""
        from qvgen.device import resolve_device

        return resolve_device(self.params.compute.device)

    @property
    def checkpoint_dir(self) -> Path:
        """Folder for resume checkpoints. It belongs to `key`, so a stage whose parameters, data or code changed finds
        it empty; it is deleted when the stage succeeds."""
        folder = self.home / ".qvgen" / "ckpt" / self.key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers (Python, NumPy or zero-dimensional tensors). Cheap: call it every step."""
        self.journal.write("metrics", step=step, values={k: float(v) for k, v in values.items()})

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Record a finished file or folder (call it after `outputs` has closed). Raises FileNotFoundError."""
        path = (self.root / path).resolve()
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist, so it cannot be logged; log it after it is written")
        self.journal.write("artifact", path=str(path), folder=folder)

    def log_text(self, text: str, name: str) -> None:
        """Record a small text under the artifact name `name`, such as "table.md"."""
        self.journal.write("text", name=name, text=text)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self.journal.write("tags", tags={k: str(v) for k, v in tags.items()})

    def tracking_run(self) -> str | None:
        """MLflow id of this run; waits until it is known. None if tracking does not answer."""
        return self.journal.wait_for("run_id")

    def progress(self, total: int, desc: str = "", initial: int = 0, unit: str = "step") -> Progress:
        """A tqdm bar with the time left: `update()`, `set_postfix(loss=...)`, also a context manager. Where stderr is
        not a terminal it prints a line every 15 seconds instead."""
        bar = Progress(total=total, desc=f"{self.name} {desc}".strip(), initial=initial, unit=unit)
        bar.counted = f"{desc} {unit}s".strip()
        self.bars.append(bar)
        return bar

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Around the writing of a checkpoint. Only a run that is interrupted needs it, so where there is no room for one this
        warns and the stage goes on; the next checkpoint is tried again."""
        try:
            yield
        except Exception as error:
            if not is_disk_full(error):
                raise
            _say(f"warning: {self.name}: no room for a checkpoint in {self.home / '.qvgen'} ({error}); the stage goes on")

    @contextmanager
    def outputs(self, path: str | Path) -> Iterator[Path]:
        """Write an output beside its place and move it there when the block ends.

        Yields an empty folder, or for a path with a suffix (metrics/qat.json) the path of a file to create. If the
        block fails in any way the old output stays whole and what was written is deleted. Raises ValueError if the
        block wrote nothing.
        """
        with write_whole(self.root / path) as new:
            yield new


class Progress(tqdm):
    """tqdm that also reads well in a log file, where a bar would be one endless line."""

    def __init__(self, **options: Any) -> None:
        terminal, self._began = sys.stderr.isatty(), time.monotonic()
        super().__init__(**options, file=sys.stderr, dynamic_ncols=terminal, mininterval=0.1 if terminal else 15)
        self.counted, self.done, self.seconds = "", 0, 0.0

    def close(self) -> None:
        if not self.seconds:
            self.done, self.seconds = self.n - self.initial, time.monotonic() - self._began
        super().close()

    def skip(self, items: int) -> None:
        """Items that are there without being done here: they count, but not towards the rate."""
        self.initial += items
        self.update(items)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda line: print(line, file=file, flush=True) if line else None

    def set_postfix(self, ordered_dict: Any = None, refresh: bool = False, **values: Any) -> None:
        super().set_postfix(ordered_dict, refresh=refresh, **values)  # drawing every step would cost more than the step


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler or `kill` sends it, or SIGHUP of a terminal that is closed; handled like Ctrl-C."""

    def __init__(self, signum: int) -> None:
        self.code = 128 + signum


def stage_main(name: str, run: Callable[[Stage], None], shared: bool = False) -> None:
    """Run a stage and exit: 0 done, 1 failed, 129, 130 or 143 interrupted (SIGHUP, SIGINT, SIGTERM).

    `shared`: several processes may run it together (qvgen/share.py), of which all but the main one return before any output.

    Errors of input, environment and numbers (ValueError, OSError, FloatingPointError) and a lack of memory print one message;
    QVGEN_DEBUG=1 shows the traceback, which the journal always keeps. Any other exception is a bug and shows its traceback.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts us with `&` would ignore it
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _terminate)
    try:
        _execute(name, run, shared)
    except KeyboardInterrupt as stop:
        _say(f"\n{name}: interrupted; run again to continue")
        sys.exit(stop.code if isinstance(stop, _Terminated) else 130)
    except Exception as error:
        memory = out_of_memory(error, name)
        if os.environ.get("QVGEN_DEBUG") == "1" or not (memory or _is_expected(error)):
            raise
        if memory:
            _say(memory)
            sys.exit(1)
        room = f"; free some room on the disk of {Path.cwd()}" if is_disk_full(error) else ""
        _say(f"{name}: {error}{room}")
        sys.exit(1)


def _execute(name: str, run: Callable[[Stage], None], shared: bool) -> None:
    root = Path.cwd()
    home = Path(os.environ.get("DVC_ROOT") or root)
    share = Share.from_environment()
    if not shared and not share.is_main:
        raise ValueError(f"RANK={share.rank}: this stage runs in one process, the one with RANK=0")
    params = load_params(root / "params.yaml")
    address = os.environ.get("DVC_STAGE", name)
    # A script may serve several stages, which begin with its name.
    facts = read_dvc_facts(root, address if address.rpartition(":")[2].startswith(name) else name)
    if not share.is_main:
        with _alone(root, f"{facts.name}.{share.rank}"), _alone(home, f"{facts.key}.{share.rank}"):
            helping = Stage(name=name, params=params, root=root, home=home, facts=facts, journal=NoJournal(), share=share)
            run(helping)
            _say(f"{summary(facts.name, params, helping.bars)}; share {share.rank + 1} of {share.world_size}")
        return
    with (
        _alone(root, facts.name),
        _alone(home, facts.key),  # an experiment in a folder of its own has its checkpoints here
        recorded(name, params, root, home, facts, share if shared else ALONE) as stage,
    ):
        run(stage)
        _say(summary(facts.name, params, stage.bars))
        stage.log_tags({f"dvc.out.{path}": value for path, value in output_hashes(root, facts).items()})


@contextmanager
def recorded(name: str, params: Params, root: Path, home: Path, facts: DvcFacts, share: Share = ALONE) -> Iterator[Stage]:
    """A stage whose run is in the journal until the block ends; its checkpoints are deleted if it ends without an error.

    If the block fails under DVC the last good outputs come back.
    """
    execution = open_execution(root, home)
    tags = facts.tags | execution.git_tags
    given = {"prefect.flow_run_id": "QVGEN_PREFECT_FLOW_RUN", "prefect.task_run_id": "QVGEN_PREFECT_TASK_RUN"}
    tags |= {tag: os.environ[variable] for tag, variable in given.items() if variable in os.environ}
    journal = Journal.create(home, facts.name, execution.id, tags=tags, params=facts.params)
    stage = Stage(name=name, params=params, root=root, home=home, facts=facts, journal=journal, share=share)
    with Forwarder(journal, home):
        try:
            yield stage
        except BaseException as error:
            stage.log_text(traceback.format_exc(), "error.txt")
            journal.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            if facts.outs and "DVC_STAGE" in os.environ:
                _restore(root, facts)
            raise
        journal.end("FINISHED")
        seal_run(root, journal.path)
    shutil.rmtree(home / ".qvgen" / "ckpt" / stage.key, ignore_errors=True)


def _restore(root: Path, facts: DvcFacts) -> None:
    try:
        restore_outputs(root, facts)
    except Exception as error:  # the reason why the stage failed must still be told
        why = "no space left on the disk" if is_disk_full(error, root) else error  # DVC speaks of link types then
        _say(f"warning: old output not restored, try `dvc checkout {facts.address}` ({why})")


@contextmanager
def _alone(root: Path, name: str) -> Iterator[None]:
    """One run of `name` at a time: two of a stage would write the same outputs, two of its key the same checkpoints."""
    folder = root / ".qvgen" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise ValueError(f"this stage already runs in {root} (process {owner}); wait for it or stop it") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _terminate(signum: int, frame: FrameType | None) -> Any:
    raise _Terminated(signum)


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal is gone
        print(text, file=sys.stderr, flush=True)


def is_disk_full(error: BaseException | None, root: Path | None = None) -> bool:
    """Whether an error, or one that it comes from, is a lack of space, as libraries tell it in classes of their own. With
    `root` also if there is none left there: not every library says why it failed."""
    full = root is not None and shutil.disk_usage(root).free < NO_ROOM
    while error is not None and not full:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
        error = error.__cause__ or error.__context__
    return full


def _is_expected(error: Exception) -> bool:
    """Bad input or a bad environment, as against a bug. safetensors and DVC have error classes of their own."""
    package = type(error).__module__.split(".")[0]
    return isinstance(error, ValueError | OSError | FloatingPointError) or package in ("safetensors", "dvc")
