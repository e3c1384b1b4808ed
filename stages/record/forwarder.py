"""The helpers that a stage starts: a process that sends its journal to MLflow, and a thread that samples system metrics."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from stages.record.journal import FINISH_SECONDS, Journal, open_private
from stages.record.system import SystemMonitor

RESTART_SECONDS = 30.0  # after which a sender that gave up on a server that hangs is started again


class Forwarder:
    """Context manager around a stage. The sender is a process of its own, because MLflow takes seconds to import and may hang
    or fail, which must not touch the stage.

    The sender holds no pipe of this process. Whoever reads this process's output to its end (`dvc repro | tee log`, the flow)
    would otherwise wait for a sender that waits for a server. It writes to a file, and a thread repeats that here.
    """

    def __init__(self, journal: Journal, home: Path) -> None:
        self._journal, self._home = journal, home
        self._log = journal.path.with_suffix(".log")
        self._told = 0  # bytes of the log that have been repeated
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: SystemMonitor | None = None
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="forwarder", daemon=True)

    def __enter__(self) -> Forwarder:
        self._start()
        self._watcher.start()
        self._monitor = SystemMonitor(self._journal)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._monitor is not None:
            self._monitor.stop()
        ends = time.monotonic() + (FINISH_SECONDS if error is None else FINISH_SECONDS / 4)
        try:
            self._done.set()
            self._watcher.join(ends - time.monotonic())
            while not self._journal.flush() and time.monotonic() < ends:
                time.sleep(1)
            if self._process is not None:
                self._process.wait(max(0.0, ends - time.monotonic()))
                self._tell()
                self._log.unlink(missing_ok=True)
        except subprocess.TimeoutExpired:
            self._tell()
            _say("tracking is slow; it catches up in the background")
        except KeyboardInterrupt:  # impatience with tracking must not fail a stage that is done
            pass

    def _start(self) -> None:
        command = [sys.executable, "-m", "stages.record.sender", str(self._journal.path), "--follow", str(os.getpid())]
        try:
            with open_private(self._log) as log:
                # A session of its own, so that Ctrl-C reaches the stage and the sender can still report how it ended.
                # In `home`, because `dvc exp run --temp` deletes the stage's own folder when it is done.
                self._process = subprocess.Popen(
                    command,
                    cwd=self._home,
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                )
        except OSError as error:
            _say(f"warning: tracking did not start ({error}); the journal is complete")

    def _watch(self) -> None:
        """Print the sender's messages, and start it again if it gave up while the stage goes on."""
        ended: float | None = None
        while not self._done.wait(0.5):
            self._tell()
            if self._process is None or self._process.poll() is None:
                ended = None
            elif ended is None:
                ended = time.monotonic()
            elif time.monotonic() - ended > RESTART_SECONDS:
                self._start()

    def _tell(self) -> None:
        with suppress(OSError), self._log.open("rb") as log:
            log.seek(self._told)
            whole, newline, _ = log.read().rpartition(b"\n")
            if newline:
                self._told += len(whole) + 1
                _say(whole.decode(errors="replace"))


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal is gone
        print(text, file=sys.stderr, flush=True)
