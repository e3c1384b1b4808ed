"""A copy of a project that passes `qvgen audit`, and the tools of somebody who changes one thing in it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.audit.blobs import open_blobs
from pipelines.audit.project import current_hash
from stages.record.connection import connect
from tests.support import audited_project as toy


@dataclass(frozen=True)
class Tamper:
    """One change. `check` must not pass after it; "" for a change that may pass, and then `why` says why."""

    check: str
    change: Callable[[Spoiled], object]
    why: str = ""


@dataclass(frozen=True)
class Spoiled:
    """The project that a tamper changes."""

    root: Path

    def sql(self, query: str, *values: Any) -> None:
        """A change of MLflow's database; one that changes nothing is a fault of the test."""
        with contextlib.closing(sqlite3.connect(self.root / "mlflow.db")) as database, database:
            assert database.execute(query, values).rowcount > 0, f"{query} {values} changes nothing"

    def ask(self, query: str, *values: Any) -> Any:
        with contextlib.closing(sqlite3.connect(self.root / "mlflow.db")) as database:
            return database.execute(query, values).fetchone()[0]

    def run(self, stage: str) -> str:
        return self.ask("SELECT run_uuid FROM tags WHERE key = 'dvc.stage' AND value = ?", stage)

    @property
    def parent(self) -> str:
        return self.ask("SELECT value FROM tags WHERE key = 'mlflow.parentRunId' LIMIT 1")

    def tag(self, stage: str, key: str, value: str | None) -> None:
        """Set a tag of a stage's run ("" for the parent's), or delete it."""
        run = self.run(stage) if stage else self.parent
        if value is None:
            self.sql("DELETE FROM tags WHERE run_uuid = ? AND key LIKE ?", run, key)
        else:
            self.sql("INSERT OR REPLACE INTO tags (run_uuid, key, value) VALUES (?, ?, ?)", run, key, value)

    def of_run(self, stage: str, column: str, value: Any) -> None:
        run = self.run(stage) if stage else self.parent
        self.sql(f"UPDATE runs SET {column} = ? WHERE run_uuid = ?", value, run)

    def delete_run(self, stage: str) -> None:
        """The row itself, as MLflow's own `delete_run` does not."""
        run = self.run(stage) if stage else self.parent
        for table in ("tags", "params", "metrics", "latest_metrics", "runs"):
            with contextlib.suppress(AssertionError):
                self.sql(f"DELETE FROM {table} WHERE run_uuid = ?", run)

    def artifact(self, stage: str, name: str, text: str | None) -> None:
        """Overwrite an artifact of a run, or delete it ("" for all)."""
        run = self.run(stage) if stage else self.parent
        folder = Path(self.ask("SELECT artifact_uri FROM runs WHERE run_uuid = ?", run).removeprefix("file://"))
        assert folder.is_relative_to(self.root)
        files = [folder / name] if name else [file for file in folder.rglob("*") if file.is_file()]
        assert files and all(file.is_file() for file in files)
        for file in files:
            file.unlink() if text is None else file.write_text(text)

    def uploaded(self, name: str, change: Callable[[bytes], bytes | None]) -> None:
        """Change a file of the packed model in MLflow, and not the blob of DVC's cache that it may be a link to."""
        location = self.ask("SELECT artifact_location FROM logged_models").removeprefix("file://")
        path = Path(location) / "artifacts/packed" / name
        assert path.is_relative_to(self.root)
        content = change(path.read_bytes() if path.exists() else b"")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)

    def edit(self, path: str, old: str, new: str) -> None:
        file = self.root / path
        text = file.read_text()
        assert old in text, f"{path} has no {old!r}"
        file.write_text(text.replace(old, new, 1))

    def amend(self, path: str, old: str, new: str) -> None:
        """Change a file in the commit that has the results."""
        self.edit(path, old, new)
        toy.git(self.root, "commit", "-qa", "--amend", "--no-edit")

    def follow(self, path: str, old: str, new: str) -> None:
        """Change a file in a commit of its own."""
        self.edit(path, old, new)
        toy.git(self.root, "commit", "-qam", "more")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def blob(self, out: str, name: str | None) -> Path:
        """The file of DVC's cache that holds one of an output's files, or its list (None)."""
        with open_blobs(self.root) as blobs:
            md5 = current_hash(self.root, out)
            path = Path(blobs.cache.oid_to_path(md5 if name is None else blobs.files(md5)[name]))
        path.chmod(0o644)
        return path

    def packed(self, name: str, change: Callable[[bytes], bytes | None]) -> None:
        """Change a file of the packed folder here, and not what DVC's cache has of it."""
        path = self.root / "artifacts/packed" / name
        content = change(path.read_bytes() if path.exists() else b"")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)

    @property
    def client(self) -> Any:
        return connect(self.root)[0]
