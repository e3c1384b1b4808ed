"""The seal: what each run reported, as a line in metrics/seal.jsonl, which git keeps.

MLflow's database can be changed by whoever can write it. A line holds what `qvgen audit` relies on, each names the sha256 of
the line before, and the audit reads the lines from the commit that has the run's results: who changes the database has to
change the history of git too. Against somebody who rewrites both, signed commits help, and nothing here does.

The stage itself writes its line when it is done, from its own journal: MLflow may be down then, and what it holds later is
what is to be checked. So do executions (with their first stage) and moves of the alias champion.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.record.journal import read_events
from stages.record.sender import LONGEST_PARAM, LONGEST_TAG, _name

FILE = Path("metrics/seal.jsonl")
FIRST = "0" * 64  # what the first line names as the one before it
SYSTEM = "system/"  # metrics of the machine, which the audit does not rely on
LONGEST_VALUE = 100  # characters; of longer ones the seal has the hash


def seal_run(root: Path, journal: Path) -> None:
    """Add the line of a stage's finished run, and that of its execution if it is the first. A full disk is a warning: the
    stage is done, and the audit says what is missing."""
    try:
        events, _ = read_events(journal)
        execution = journal.with_name(f"{events[0]['pipeline']}.jsonl")
        entries = [_run(events)]
        if execution.exists():
            entries.insert(0, _execution(read_events(execution)[0][0]))
        add(root, entries)
    except OSError as error:
        print(f"warning: the run is not sealed in {FILE} ({error})", file=sys.stderr)


def seal_promotion(root: Path, model: str, alias: str, record: Mapping[str, Any]) -> None:
    """Add the line of a move of an alias. A full disk is a warning."""
    try:
        add(root, [{"kind": "promotion", "id": f"{model}@{alias} {record['time']}", "record": dict(record)}])
    except OSError as error:
        remedy = "`qvgen promote` in a checkout that can be written does it"
        print(f"warning: the promotion is not sealed in {FILE} ({error}); {remedy}", file=sys.stderr)


def add(root: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Append entries that the file does not have yet."""
    path = root / FILE
    lock = root / ".qvgen" / "locks" / "seal"
    for folder in (path.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # stages run side by side
        lines = path.read_text().splitlines() if path.exists() else []
        known = {(entry.get("kind"), entry.get("id")) for entry in read_lines("\n".join(lines))}
        previous = _sha256(lines[-1].encode()) if lines else FIRST
        text = ""
        for entry in entries:
            if (entry["kind"], entry["id"]) not in known:
                line = json.dumps(entry | {"previous": previous}, sort_keys=True)
                previous, text = _sha256(line.encode()), f"{text}{line}\n"
        with path.open("a") as file:
            file.write(text)


def read_lines(text: str) -> list[dict[str, Any]]:
    """The entries; a line that is none is left out, and its place in the chain with it."""
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def chain_faults(text: str) -> list[str]:
    """What is wrong with the chain. A merge of two branches puts their lines one after the other, so a line may follow any
    that stands before it, not the last one only."""
    seen, faults = {FIRST}, []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            previous = json.loads(line)["previous"]
        except (ValueError, TypeError, KeyError):
            faults.append(f"line {number} is damaged")
            continue
        if previous not in seen:
            faults.append(f"line {number} follows a line that is not there")
        seen.add(_sha256(line.encode()))
    return faults


def value_of(text: object, longest: int = LONGEST_TAG) -> str:
    """A tag or parameter as the seal has it."""
    cut = str(text)[:longest]
    return cut if len(cut) <= LONGEST_VALUE else f"sha256:{_sha256(cut.encode())}"


def curve_hash(points: Iterable[tuple[int, float]]) -> str:
    """Hash of a metric's points (step, value), in any order, each counted once."""
    return _sha256(json.dumps(sorted({(step, repr(float(value))) for step, value in points})).encode())[:32]


def text_hash(content: bytes) -> str:
    return _sha256(content)


def _run(events: list[dict[str, Any]]) -> dict[str, Any]:
    start, end = events[0], events[-1]
    tags = dict(start["tags"])
    points: dict[str, set[tuple[int, float]]] = {}
    artifacts: dict[str, str] = {}
    registered: dict[str, Any] = {}
    for event in events:
        match event["event"]:
            case "tags":
                tags |= event["tags"]
            case "metrics":
                for key, value in event["values"].items():
                    if not key.startswith(SYSTEM):
                        points.setdefault(_name(key), set()).add((event["step"] or 0, float(value)))
            case "text":
                artifacts[event["name"]] = text_hash(event["text"].encode())
            case "artifact":
                artifacts |= _files(Path(event["path"]), event["folder"])
            case "register":
                registered = {
                    "tags": {_name(key): value_of(value) for key, value in event["tags"].items()},
                    "params": {key: value_of(value, LONGEST_PARAM) for key, value in event["params"].items()},
                    "metrics": {key: repr(float(value)) for key, value in event["metrics"].items()},
                }
    return {
        "kind": "run",
        "id": start["id"],
        "execution": start["pipeline"],
        "started": start["time"],
        "ended": end["time"],
        "params": {_name(key): value_of(value, LONGEST_PARAM) for key, value in start["params"].items()},
        "tags": {_name(key): value_of(value) for key, value in tags.items()},
        "metrics": {key: curve_hash(found) for key, found in points.items()},
        "artifacts": artifacts,
        "registered": registered,
    }


def _execution(start: dict[str, Any]) -> dict[str, Any]:
    texts = {name: text_hash(text.encode()) for name, text in start.get("texts", {}).items()}
    return {"kind": "execution", "id": start["id"], "tags": start["tags"], "artifacts": texts, "started": start["time"]}


def _files(path: Path, folder: str | None) -> dict[str, str]:
    """Name in MLflow -> hash of what was logged."""

    def found() -> Iterator[tuple[str, Path]]:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    yield f"{folder or path.name}/{file.relative_to(path).as_posix()}", file
        elif path.exists():
            yield (f"{folder}/" if folder else "") + path.name, path

    return {name: text_hash(file.read_bytes()) for name, file in found()}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
