"""`qvgen lineage sync`, and the end of an execution: what the stages' own journals cannot say.

Stages write journals and a process beside each sends them (stages/record/sender.py). What is left over: journals that could
not be sent, runs that were killed together with their sender, and stages that were up to date and therefore never ran.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.commands.results import markdown_table
from pipelines.run.dag import read_pipeline
from stages.record.journal import FOLDER, LAST, Journal, open_pipeline, read_events, read_receipt
from stages.record.runs import CACHED
from stages.runtime.dvc import output_hashes, read_dvc_facts

PREFIX = "pipeline-"  # of the journals of executions


@dataclass(frozen=True)
class Synced:
    """Journals sent now, and those that could not be sent (the reason is in their receipt)."""

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
        if events and (events[-1]["event"] in LAST or not (path.name.startswith(PREFIX) or _alive(events[0]))):
            found.append(path)
    return found


def sync(root: Path) -> Synced:
    """Send every journal that is left over, and record the stages that were up to date in the newest execution.

    It can be run any number of times: a run is found again by its journal's id, and MLflow keeps equal points once.
    """
    newest = max((root / FOLDER).glob(f"{PREFIX}*.jsonl"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is not None and not _running(root, newest.stem):
        recorded = _recorded(root, newest.stem).keys()
        other = any(":" in stage for stage in recorded)  # of another dvc.yaml, which leaves the rest of the pipeline alone
        read = read_pipeline(root)
        missing = set() if other else read.graph.keys() - recorded - read.changed
        record_cached(root, newest.stem.removeprefix(PREFIX), sorted(missing))
        if not other:
            record_results(root, newest)
    waiting = unsent_journals(root)
    for path in waiting:
        if read_events(path)[0][-1]["event"] not in LAST:
            Journal(path).end("KILLED")  # with its sender: nobody has said so
    send(root, waiting)
    left = {path.stem: read_receipt(path).get("failed") or "not sent" for path in unsent_journals(root)}
    return Synced([path.stem for path in waiting if path.stem not in left], left)


def close_execution(root: Path, token: str, cached: Sequence[str]) -> None:
    """Record the stages that an execution found up to date, and what came out of it. Never raises: a record is no reason for a
    run to fail."""
    try:
        journals = record_cached(root, token, cached)
        send(root, [*journals, *record_results(root, root / FOLDER / f"{PREFIX}{token}.jsonl")])
    except Exception as error:
        print(f"warning: {len(cached)} stages that were up to date are not recorded: {error}", file=sys.stderr)


def record_cached(root: Path, token: str, addresses: Sequence[str]) -> list[Path]:
    """Write a journal for each stage that was up to date, a run of no length that names the run whose outputs it has."""
    written = []
    pipeline = open_pipeline(root, root, token) if addresses else None
    for address in addresses:
        assert pipeline is not None
        facts = read_dvc_facts(root, address)
        outs = {f"dvc.out.{path}": md5 for path, md5 in output_hashes(root, facts).items()}
        tags = facts.tags | pipeline.git_tags | outs | {"stage.state": CACHED}
        journal = Journal.create(root, facts.name, pipeline.id, tags=tags, params=facts.params)
        journal.end("FINISHED")
        written.append(journal.path)
    return written


def record_results(root: Path, journal: Path) -> list[Path]:
    """Close the journal of an execution, once, with what a person looks for on its page in MLflow: dvc.lock as it is now, and
    unless a stage failed the table of results as the run's description, and the pictures."""
    if not journal.exists() or read_events(journal)[0][-1]["event"] in LAST:
        return []
    execution = Journal(journal)
    if (lock := root / "dvc.lock").is_file():
        execution.write("text", name="results/dvc.lock", text=lock.read_text())
    ends = [read_events(path)[0][-1] for path in _recorded(root, journal.stem).values()]
    if all(end.get("status") == "FINISHED" for end in ends):  # else they would be those of an earlier execution
        with suppress(ValueError):  # nothing was measured
            table = markdown_table(root)
            execution.write("text", name="results/results.md", text=table + "\n")
            execution.write("tags", tags={"mlflow.note.content": table})
        if (sheet := root / "artifacts" / "evaluation" / "contact_sheet.png").is_file():
            execution.write("artifact", path=str(sheet), folder="results")
    execution.write("closed")
    return [journal]


def send(root: Path, journals: Sequence[Path]) -> None:
    """Send journals to MLflow in one process; what fails is said once and stays for the next `qvgen lineage sync`."""
    if journals:
        command = [sys.executable, "-m", "stages.record.sender", *map(str, journals)]
        subprocess.run(command, cwd=root, check=False)


def runs_of_execution(root: Path, token: str) -> dict[str, str]:
    """Stage -> id of its run in MLflow, of one execution, as far as they are known."""
    found = {stage: read_receipt(path).get("run_id") for stage, path in _recorded(root, f"{PREFIX}{token}").items()}
    return {stage: run for stage, run in found.items() if run}


def _recorded(root: Path, pipeline: str) -> dict[str, Path]:
    """Stage -> its newest journal in an execution."""
    found = {}
    for path in sorted((root / FOLDER).glob("*.jsonl")):
        if not path.name.startswith(PREFIX):
            start = next(iter(read_events(path)[0]), {})
            if start.get("pipeline") == pipeline:
                found[start["tags"]["dvc.stage"]] = path
    return found


def _running(root: Path, pipeline: str) -> bool:
    """Whether one of the execution's stages runs, or the `dvc repro` that it is, which may be between two stages."""
    pid, separator, created = pipeline.removeprefix(PREFIX).partition("-")
    if separator and pid.isdigit() and created.isdigit() and _alive({"pid": int(pid), "time": int(created) + 1}):
        return True
    events = [read_events(path)[0] for path in _recorded(root, pipeline).values()]
    return any(e[-1]["event"] != "end" and _alive(e[0]) for e in events if e)


def _alive(start: dict) -> bool:
    """Whether the stage that wrote this start of a journal still runs; a process id may have gone to another since."""
    import psutil

    try:
        return psutil.Process(start["pid"]).create_time() * 1000 <= start["time"]
    except (KeyError, psutil.Error):
        return False
