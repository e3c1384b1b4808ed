"""Sends journals to MLflow. Runs as a process of its own beside each stage (`python -m stages.record.sender JOURNAL`).

Sending is idempotent: a run is found again by its tag `journal.id`, and MLflow keeps equal points once, so a journal can be
sent any number of times. Timeouts of requests start again with every byte, so each entry has a deadline in all; a server that
misses one ends this process.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.record.connection import connect, locked, public_uri, tracking_uri
from stages.record.journal import LAST, Journal, read_events, read_receipt, write_receipt
from stages.record.model.upload import SLOWEST
from stages.record.model.version import register_version
from stages.record.runs import CACHED, find_producer, log_datasets, log_texts_once
from stages.record.secrets import without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

FLUSH_SECONDS, RETRY_SECONDS = 3.0, 30.0
METRICS_PER_BATCH, PARAMS_PER_BATCH, TAGS_PER_BATCH = 1000, 100, 100  # MLflow's limits
LONGEST_TAG, LONGEST_PARAM = 5000, 6000
ENTRY_SECONDS, FILES_SECONDS = 30.0, 600.0  # that a server may take for one entry of a journal, in all
NOT_SENT, GAVE_UP = 3, 4  # exit codes
APART = ("artifact", "text", "register")  # other stores: one that fails must not hold up the metrics


def _name(key: str) -> str:
    """A key that MLflow accepts: letters, digits and `_-. :/`."""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)[:250]


def _batched(entries: list[Any], size: int) -> Iterator[list[Any]]:
    return (entries[i : i + size] for i in range(0, len(entries), size))


def _seconds(event: dict[str, Any]) -> float:
    """That a server may take for an entry, in all."""
    files = event.get("files", {}) if event["event"] == "register" and event.get("upload") == "copy" else {}
    return FILES_SECONDS if event["event"] == "artifact" else ENTRY_SECONDS + sum(f["bytes"] for f in files.values()) / SLOWEST


class Sender:
    """Sends the events of one journal, each at least once."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.home = journal.parents[2]
        self.unsent: list[dict[str, Any]] = []
        self.ended = False  # whether the stage has said how it ended, or the execution that nothing comes any more
        self._offset = 0
        self._client: MlflowClient
        self._experiment = self._run = self._parent = ""

    def read(self) -> None:
        events, self._offset = read_events(self.journal, self._offset)
        self.unsent += events
        self.ended |= any(event["event"] in LAST for event in events)

    def send(self) -> None:
        """Send all that was read. Raises what MLflow raises; what was not sent then is sent by the next call."""
        from mlflow.exceptions import MlflowException  # takes seconds, which are not the server's

        if not self._experiment:
            with self._deadline(ENTRY_SECONDS):
                self._client, self._experiment = connect(self.home)

        kept: list[dict[str, Any]] = []
        problem: Exception | None = None
        while self.unsent:
            events = list(itertools.takewhile(lambda event: event["event"] == "metrics", self.unsent)) or self.unsent[:1]
            kind = events[0]["event"]
            try:
                with self._deadline(_seconds(events[0])):
                    self._send_metrics(events) if kind == "metrics" else self._send_one(events[0])
            except Exception as error:
                if isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE" and self._run:
                    print(f"warning: MLflow refuses a {kind} entry: {error}", file=sys.stderr)
                elif kind in APART:
                    kept, problem = [*kept, *events], error
                else:
                    self.unsent[:0] = kept
                    raise
            del self.unsent[: len(events)]
        self.unsent = kept
        if problem is not None:
            raise problem
        if self.ended:
            self._note(complete=True)

    def _send_metrics(self, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(_name(key), value, event["time"], event["step"] or 0)
            for event in events
            for key, value in event["values"].items()
        ]
        for batch in _batched(points, METRICS_PER_BATCH):
            self._client.log_batch(self._run, metrics=batch)

    def _send_one(self, event: dict[str, Any]) -> None:
        client, run = self._client, self._run
        match event["event"]:
            case "start" if "pipeline" in event:
                self._open_run(event)
            case "start":  # of an execution, the parent of its stages' runs
                self._run = self._parent_of(event)
                self._note(run_id=self._run, complete=False)
            case "tags":
                self._log_tags(run, event["tags"])
            case "text":
                client.log_text(run, event["text"], event["name"])
            case "artifact":
                path = Path(event["path"])
                if path.is_dir():
                    client.log_artifacts(run, str(path), event["folder"] or path.name)
                elif path.exists():  # a later run may have replaced it before a journal is sent again
                    client.log_artifact(run, str(path), event["folder"])
            case "end":
                client.set_terminated(run, event["status"], event["time"])
                self._close_parent(event)
            case "register":
                version = register_version(client, self._experiment, run, event, lambda: locked(self.home))
                found = {"name": version.name, "version": int(version.version), "run_id": version.run_id}
                self._note(registered=found)

    def _open_run(self, event: dict[str, Any]) -> None:
        from mlflow.entities import Param

        with locked(self.home):
            self._parent = self._open_parent(event["pipeline"], event["time"])
        tags = event["tags"] | {"mlflow.parentRunId": self._parent}
        if tags.get("stage.state") == CACHED:
            tags["produced_by"] = find_producer(self._client, self._experiment, tags) or "unknown"
        self._run = self._find_or_create(event["id"], event["name"], event["time"], tags)
        log_datasets(self._client, self._run, tags)
        params = [Param(_name(key), str(value)[:LONGEST_PARAM]) for key, value in event["params"].items()]
        for batch in _batched(params, PARAMS_PER_BATCH):
            self._client.log_batch(self._run, params=batch)
        self._note(run_id=self._run, parent_run_id=self._parent, complete=False)

    def _open_parent(self, id: str, time: int) -> str:
        """The run of the pipeline execution, shown as running while one of its stages runs."""
        path = self.journal.with_name(f"{id}.jsonl")
        unknown = {"id": id, "name": "pipeline", "time": time, "run_id": None, "tags": {}}  # its journal found no room
        run_id = self._parent_of(read_events(path)[0][0] if path.exists() else unknown)
        if self._client.get_run(run_id).info.status == "FINISHED":
            self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _parent_of(self, start: dict[str, Any]) -> str:
        run_id = start["run_id"] or self._find_or_create(start["id"], start["name"], start["time"], start["tags"])
        log_texts_once(self._client, run_id, start.get("texts", {}))
        return run_id

    def _close_parent(self, end: dict[str, Any]) -> None:
        """DVC has no hook after the last stage, so each one leaves the parent in its final state; a failure sticks."""
        with locked(self.home):
            if self._client.get_run(self._parent).info.status in ("RUNNING", "FINISHED"):
                self._client.set_terminated(self._parent, end["status"], end["time"])

    def _find_or_create(self, id: str, name: str, time: int, tags: dict[str, str]) -> str:
        found = self._client.search_runs([self._experiment], f"tags.`journal.id` = '{id}'", max_results=1)
        if found:
            return found[0].info.run_id
        run = self._client.create_run(self._experiment, start_time=time, tags={"journal.id": id}, run_name=name)
        self._log_tags(run.info.run_id, tags)
        return run.info.run_id

    def _log_tags(self, run: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(_name(key), str(value)[:LONGEST_TAG]) for key, value in tags.items()]
        for batch in _batched(entries, TAGS_PER_BATCH):
            self._client.log_batch(run, tags=batch)

    @contextmanager
    def _deadline(self, seconds: float) -> Iterator[None]:
        """End this process if the block takes longer: nothing else stops a request that a server answers byte by byte. A local
        database is no server; only a busy machine makes it slow."""

        def give_up() -> None:
            self.fail(TimeoutError(f"no whole answer within {seconds:g} s"))
            sys.stderr.flush()
            os._exit(GAVE_UP)

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        if not tracking_uri(self.home).startswith("sqlite"):
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _note(self, failed: str | None = None, **entries: Any) -> None:
        """Write the receipt, for whoever waits for an answer."""
        where = public_uri(tracking_uri(self.home), self.home)
        receipt = read_receipt(self.journal) | {"tracking_uri": where, "failed": failed}
        write_receipt(self.journal, receipt | entries)

    def fail(self, error: Exception) -> None:
        """Say once why nothing is sent."""
        first, *_ = without_secrets(str(error)).splitlines() or [""]
        reason = f"{type(error).__name__}: {first[:120]}"
        if not read_receipt(self.journal).get("failed"):
            uri = public_uri(tracking_uri(self.home), self.home)
            print(f"warning: tracking at {uri} does not answer, see {self.journal} ({reason})", file=sys.stderr)
        with suppress(OSError):  # a full disk
            self._note(failed=reason)


def follow(journal: Path, writer: int | None) -> bool:
    """Send a journal while process `writer` appends to it (None: send what is there). Returns whether all was sent.

    While tracking cannot be reached it says so once and tries again every 30 seconds, and a last time at the end.
    """
    sender = Sender(journal)
    due = time.monotonic()
    while True:
        alive = writer is not None and os.getppid() == writer
        sender.read()
        if not alive and writer is not None and not sender.ended:
            Journal(journal).end("KILLED")  # nobody else can say it any more
            sender.read()
        last = sender.ended or not alive
        if last or time.monotonic() >= due:
            try:
                sender.send()
                due = time.monotonic() + FLUSH_SECONDS
            except Exception as error:  # whatever goes wrong here must not reach the stage
                sender.fail(error)
                due = time.monotonic() + RETRY_SECONDS
        if last:
            return not sender.unsent
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Send a journal to MLflow.")
    parser.add_argument("journals", type=Path, nargs="+")
    parser.add_argument("--follow", type=int, metavar="PID", help="go on until this parent process is done")
    options = parser.parse_args()
    os.nice(5)  # the stage comes first
    sent = [follow(journal.resolve(), options.follow) for journal in options.journals]
    sys.exit(0 if all(sent) else NOT_SENT)


if __name__ == "__main__":
    main()
