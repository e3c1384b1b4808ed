"""Several pieces of work at a time, each in a process of its own: its peak memory is its own, and one that fails takes no
other with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

GRACE_SECONDS = 20.0  # between SIGTERM, at which a case reports that it was stopped, and the end


def run_all(work: Mapping[str, Callable[[], object]], jobs: int, logs: Path) -> list[str]:
    """Call each, in order, at most `jobs` at a time. Returns the names of those that failed.

    What a process prints goes to `logs`/<name>.log. The processes end with this one, however it ends. The work must be
    picklable: processes are started afresh, because a forked PyTorch hangs.
    """
    from tqdm import tqdm

    context = multiprocessing.get_context("spawn")
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running, failed = list(work), dict[int, tuple[BaseProcess, float]](), list[str]()
    with tqdm(total=len(work), unit="case", disable=None) as progress:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                # daemon: Python stops it if this process ends early.
                process = context.Process(target=_run, args=(work[name], logs / f"{name}.log"), name=name, daemon=True)
                process.start()
                running[process.sentinel] = process, time.monotonic()
            for sentinel in wait(list(running)):
                process, started = running.pop(sentinel)  # type: ignore[arg-type]
                process.join()
                if process.exitcode:
                    failed.append(process.name)
                state = "failed" if process.exitcode else "done"
                print(f"{time.strftime('%H:%M:%S')} {state} {process.name} ({time.monotonic() - started:.0f} s)", flush=True)
                progress.update()
    return failed


def _run(work: Callable[[], object], log: Path) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handled like Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    with suppress(KeyboardInterrupt):
        work()
        return
    sys.exit(1)


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its children."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)
