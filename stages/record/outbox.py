"""Journals that MLflow does not have yet: which they are, and sending them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.record.execution import PREFIX
from stages.record.journal import FOLDER, LAST, Journal, read_events, read_receipt


@dataclass(frozen=True)
class Synced:
    """Ids of journals sent now, and those that could not be sent with the reason that is in their receipt."""

    sent: list[str]
    unsent: dict[str, str]


def unsent_journals(root: Path) -> list[Path]:
    """Journals that MLflow does not have in full, oldest first; those of stages that still run, and of executions that are not
    closed, are left out."""
    found = []
    for path in sorted((root / FOLDER).glob("*.jsonl")):
        if read_receipt(path).get("complete"):
            continue
        events, _ = read_events(path)
        if events and (events[-1]["event"] in LAST or not (path.name.startswith(PREFIX) or is_alive(events[0]))):
            found.append(path)
    return found


def sync(root: Path) -> Synced:
    """Send every journal that is left over.

    It can be run any number of times: a run is found again by its journal's id, and MLflow keeps equal points once.
    """
    waiting = unsent_journals(root)
    for path in waiting:
        if read_events(path)[0][-1]["event"] not in LAST:
            Journal(path).end("KILLED")  # with its sender: nobody has said so
    send(root, waiting)
    left = {path.stem: read_receipt(path).get("failed") or "not sent" for path in unsent_journals(root)}
    return Synced([path.stem for path in waiting if path.stem not in left], left)


def send(root: Path, journals: Sequence[Path], seconds: float | None = None) -> None:
    """Send journals to MLflow in one process, within `seconds` in all; what fails is said once and stays for the next
    `qvgen lineage sync`."""
    if journals:
        command = [sys.executable, "-m", "stages.record.sender", *map(str, journals)]
        try:
            subprocess.run(command, cwd=root, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            print(f"warning: tracking took longer than {seconds:g} s; `qvgen lineage sync` sends the rest", file=sys.stderr)


def recorded(root: Path, execution: str) -> dict[str, Path]:
    """Stage -> its newest journal in an execution, which is named by its id."""
    found = {}
    for path in sorted((root / FOLDER).glob("*.jsonl")):
        if not path.name.startswith(PREFIX):
            start = next(iter(read_events(path)[0]), {})
            if start.get("pipeline") == execution:
                found[start["tags"]["dvc.stage"]] = path
    return found


def is_running(root: Path, execution: str) -> bool:
    """Whether one of the execution's stages runs, or the `dvc repro` that it is, which may be between two stages."""
    pid, separator, created = execution.removeprefix(PREFIX).partition("-")
    if separator and pid.isdigit() and created.isdigit() and is_alive({"pid": int(pid), "time": int(created) + 1}):
        return True
    events = [read_events(path)[0] for path in recorded(root, execution).values()]
    return any(e[-1]["event"] != "end" and is_alive(e[0]) for e in events if e)


def is_alive(start: dict[str, Any]) -> bool:
    """Whether the stage that wrote this start of a journal still runs; a process id may have gone to another since."""
    import psutil

    try:
        return psutil.Process(start["pid"]).create_time() * 1000 <= start["time"]
    except (KeyError, psutil.Error):
        return False
