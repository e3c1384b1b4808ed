"""The local record of a run: one file of JSON lines, written before anything goes to MLflow.

Nothing a stage reports can be lost or slowed down by tracking: a stage only appends lines here, and another process
(stages/record/sender.py) sends them on. Each line is complete when `write` returns, so `kill -9` costs nothing.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from stages.runtime.machine import computed_on

Status = Literal["FINISHED", "FAILED", "KILLED"]
FOLDER = Path(".qvgen") / "journal"
LAST = ("end", "closed")  # events after which nothing comes: of a stage's journal, of an execution's
FINISH_SECONDS = 60  # how long a stage that is done waits for tracking to catch up


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
    def create(cls, home: Path, name: str, execution: str, *, tags: Mapping[str, str], params: Mapping[str, Any]) -> Journal:
        id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{name}-{uuid.uuid4().hex[:8]}"
        journal = cls(home / FOLDER / f"{id}.jsonl")
        fields = {"id": id, "name": name, "pipeline": execution, "tags": dict(tags), "params": dict(params)}
        journal.write("start", pid=os.getpid(), **fields)
        return journal

    @property
    def id(self) -> str:
        return self.path.stem

    def start_tags(self) -> dict[str, str]:
        """The tags that the run began with; {} if they found no room."""
        events = read_events(self.path)[0] if self.path.exists() else []
        return dict(events[0].get("tags", {})) if events else {}

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
            with open_private(self.path) as file:
                file.write(text)
            self._waiting.clear()
        except OSError as error:
            if not self._waiting:
                print(f"warning: {self.path} cannot be written ({error}); the run goes on", file=sys.stderr)
            self._waiting += lines
        return not self._waiting

    def end(self, status: Status, computed: bool = True) -> None:
        """`computed`: by this process, whose threads and processor are recorded then."""
        if computed and status == "FINISHED":
            self.write("tags", tags=computed_on())
        self.write("end", status=status)

    def wait_for(self, entry: str, timeout: float = FINISH_SECONDS) -> Any:
        """An entry of the receipt, once the sender has written it; None if tracking does not answer in time."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            receipt = read_receipt(self.path)
            if receipt.get(entry) or receipt.get("failed"):
                return receipt.get(entry)
            time.sleep(0.1)
        return None


class NoJournal(Journal):
    """Of a process that helps another one, whose journal records the stage."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull))

    def write(self, event: str, **fields: Any) -> None:
        """Nothing."""


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
    """What the sender has done with a journal so far: run_id, parent_run_id, registered,
    complete, tracking_uri, failed."""
    try:
        return json.loads(receipt_path(journal).read_text())
    except FileNotFoundError:
        return {}


def write_receipt(journal: Path, receipt: Mapping[str, Any]) -> None:
    draft = receipt_path(journal).with_suffix(f".{os.getpid()}")
    with open_private(draft) as file:
        file.write(json.dumps(receipt))
    draft.replace(receipt_path(journal))


def open_private(path: Path) -> TextIO:
    """A file to append to that only its owner may read: parameters, differences and messages may hold secrets."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8")
