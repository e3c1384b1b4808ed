"""`qvgen lineage sync`, and the end of an execution: records that the stages' own journals cannot hold.

Stages write journals and a process beside each sends them (stages/record). What is left over, and needs the graph of the
pipeline: stages that were up to date and therefore never ran, and the results of an execution as a whole.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pipelines.commands.results import markdown_table
from pipelines.run.dag import read_plan
from stages.record import outbox
from stages.record.execution import PREFIX, open_execution
from stages.record.journal import FOLDER, LAST, Journal, read_events, read_receipt
from stages.record.outbox import Synced, is_running, recorded, send
from stages.record.runs import CACHED
from stages.runtime.dvc import output_hashes, read_dvc_facts

CLOSE_SECONDS = 120.0  # that the end of a run may wait for tracking, in all


def sync(root: Path) -> Synced:
    """Record the stages that were up to date in the newest execution, and send every journal that is left over. It can be run
    any number of times. A checkout that cannot be written has nothing to record, and what it holds is named as left over."""
    if not os.access(root, os.W_OK):
        return Synced([], {path.stem: "this checkout cannot be written" for path in outbox.unsent_journals(root)})
    newest = max((root / FOLDER).glob(f"{PREFIX}*.jsonl"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is not None and not is_running(root, newest.stem):
        known = recorded(root, newest.stem).keys()
        other = any(":" in stage for stage in known)  # of another dvc.yaml, which leaves the rest of the pipeline alone
        plan = read_plan(root)
        missing = set() if other else plan.graph.keys() - known - plan.changed
        record_cached(root, newest.stem.removeprefix(PREFIX), sorted(missing))
        if not other:
            record_results(root, newest)
    return outbox.sync(root)


def close_execution(root: Path, token: str, cached: Sequence[str]) -> None:
    """Record the stages that an execution found up to date, and what came out of it. Never raises: a record is no reason for a
    run to fail."""
    try:
        journals = record_cached(root, token, cached)
        send(root, [*journals, *record_results(root, root / FOLDER / f"{PREFIX}{token}.jsonl")], CLOSE_SECONDS)
    except Exception as error:
        print(f"warning: {len(cached)} stages that were up to date are not recorded: {error}", file=sys.stderr)


def record_cached(root: Path, token: str, addresses: Sequence[str]) -> list[Path]:
    """Write a journal for each stage that was up to date, a run of no length that names the run whose outputs it has."""
    written = []
    execution = open_execution(root, root, token) if addresses else None
    for address in addresses:
        assert execution is not None
        facts = read_dvc_facts(root, address)
        outs = {f"dvc.out.{path}": md5 for path, md5 in output_hashes(root, facts).items()}
        tags = facts.tags | execution.git_tags | outs | {"stage.state": CACHED}
        journal = Journal.create(root, facts.name, execution.id, tags=tags, params=facts.params)
        journal.end("FINISHED", computed=False)
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
    ends = [read_events(path)[0][-1] for path in recorded(root, journal.stem).values()]
    if all(end.get("status") == "FINISHED" for end in ends):  # else they would be those of an earlier execution
        with suppress(ValueError):  # nothing was measured
            table = markdown_table(root)
            execution.write("text", name="results/results.md", text=table + "\n")
            execution.write("tags", tags={"mlflow.note.content": table})
        if (sheet := root / "artifacts" / "evaluation" / "contact_sheet.png").is_file():
            execution.write("artifact", path=str(sheet), folder="results")
    execution.write("closed")
    return [journal]


def runs_of_execution(root: Path, token: str) -> dict[str, str]:
    """Stage -> id of its run in MLflow, of one execution, as far as they are known."""
    found = {stage: read_receipt(path).get("run_id") for stage, path in recorded(root, f"{PREFIX}{token}").items()}
    return {stage: run for stage, run in found.items() if run}
