"""`qvgen repro`: `dvc repro` with this interpreter, quiet about telemetry, one at a time, and a clean end on Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

INTERRUPTED = 130


def repro(root: Path, arguments: Sequence[str] = ()) -> int:
    """Run `dvc repro` in `root` and return its exit code; 130 if it was interrupted (stages continue next time)."""
    with only_one(root):
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *arguments]
        started: list[subprocess.Popen[bytes]] = []
        with _forwarding(started) as received:
            # A session of its own: what we forward reaches dvc and its stage exactly once, not from the terminal as well.
            child = subprocess.Popen(command, cwd=root, env=environment(root), start_new_session=True)
            started.append(child)
            code = child.wait()
    if received:
        print("\nInterrupted. Finished stages are kept and training goes on from its last checkpoint: run it again.")
        return INTERRUPTED
    return code


def environment(root: Path) -> dict[str, str]:
    """This process's variables; those of .env.defaults where they are not set; this interpreter's folder first on PATH,
    so that the stages' `python` is this one."""
    variables = dict(os.environ)
    defaults = root / ".env.defaults"
    for line in defaults.read_text().splitlines() if defaults.is_file() else ():
        name, separator, value = line.partition("=")
        if separator and not name.lstrip().startswith("#"):
            variables.setdefault(name.strip(), value.strip())
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", os.defpath)])
    return variables


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Hold .qvgen/repro.lock; if another run holds it, say so and wait. The lock dies with its process."""
    from filelock import FileLock, Timeout

    folder = root / ".qvgen"
    folder.mkdir(exist_ok=True)
    owner = folder / "repro.pid"
    lock = FileLock(folder / "repro.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        pid = owner.read_text() if owner.exists() else "unknown"
        print(f"Another run is active (process {pid}); waiting until it ends ...", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _forwarding(started: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass SIGINT, SIGTERM and SIGHUP on to the process group of the started child; yields the list of those received.

    A second Ctrl-C kills the group. The handlers are set before the child starts, which for SIGINT also means that it does
    not inherit "ignored" from a shell that started us with `&`.
    """
    received: list[int] = []

    def forward(signum: int, _frame: object) -> None:
        received.append(signum)
        if not started:
            raise KeyboardInterrupt
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.killpg(started[0].pid, signum if len(received) == 1 else signal.SIGKILL)

    before = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
