"""Run a command that must not outlive whoever started it: `python -m pipelines.run.guard [--deadline SECONDS] -- COMMAND ...`.

A flow's time limit does not stop a process, and cancelling a flow leaves the processes of its processes alive. The command
runs in a process group of its own here; the whole group is stopped when this process is told to stop, when its parent has
gone (`kill -9` of a flow), or at the deadline. Exit code: the command's own, 124 at the deadline, 130 when stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

GRACE_SECONDS = 20.0  # between Ctrl-C, at which a stage restores its outputs and reports, and SIGKILL
POLL_SECONDS = 0.2
DEADLINE, STOPPED = 124, 130


def guard(command: Sequence[str], deadline: float | None = None) -> int:
    """Run `command` to its end and return its exit code; `deadline` in seconds from now."""
    parent = os.getppid()
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: told.append(received))
    child = subprocess.Popen(command, start_new_session=True)
    started = time.monotonic()
    while True:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(POLL_SECONDS)
        if told or os.getppid() != parent:
            _stop(child)
            return STOPPED
        if deadline is not None and time.monotonic() - started > deadline:
            print(f"stopped: {deadline:g} s, the deadline, are over", file=sys.stderr, flush=True)
            _stop(child)
            return DEADLINE


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ctrl-C for the group of `child`, and SIGKILL for what is left of it after GRACE_SECONDS."""
    ends = time.monotonic() + GRACE_SECONDS
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGINT)
        while time.monotonic() < ends:
            child.poll()  # a dead leader is part of its group until it is waited for
            os.killpg(child.pid, 0)  # raises once the group is empty
            time.sleep(POLL_SECONDS)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a command that does not outlive its parent.")
    parser.add_argument("--deadline", type=float, default=None, metavar="SECONDS")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    sys.exit(guard(options.command, options.deadline))


if __name__ == "__main__":
    main()
