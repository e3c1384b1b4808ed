"""A disk that is really full (a small tmpfs) under the journal, and under the outputs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support import toy_project
from tests.support.toy_project import PATIENCE, run, start, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.slow]

POINTS = 300
STAGE = f"""
import time
from pathlib import Path
from stages.runtime.run import stage_main

def run(stage):
    with stage.outputs("artifacts/a") as folder:
        for step in range({POINTS}):
            stage.log_metrics({{"loss": 1 / (step + 1), "name of a metric that takes some room": step}}, step=step)
        size = int((stage.root / "ask").read_text())
        (folder / "value").write_bytes(bytes(size))
        (stage.root / "started").touch()
        while (stage.root / "wait").exists():
            time.sleep(0.1)

stage_main("a", run)
"""
JOURNAL = ".qvgen/journal"


def mount(folder: Path, kilobytes: int, *options: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={kilobytes}k"]), "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("only root can mount a small file system")
    toy_project.make(tmp_path)
    (tmp_path / "stages" / "a.py").write_text(STAGE)
    yield tmp_path
    for folder in (JOURNAL, "artifacts"):
        subprocess.run(["umount", "-l", str(tmp_path / folder)], capture_output=True, check=False)


def runs(project: Path) -> list[tuple[str, int]]:
    """Status and number of points of every run of stage a, oldest first."""
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("qvgen")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], "tags.`dvc.stage` = 'a'", order_by=["attributes.start_time"])
    return [(r.info.status, len(client.get_metric_history(r.info.run_id, "loss"))) for r in found]


def test_a_journal_without_room_stops_no_stage_and_is_written_once_there_is_some(project: Path) -> None:
    (project / "ask").write_text("1")
    (project / "wait").touch()
    mount(project / JOURNAL, 300)
    (project / JOURNAL / "something large").write_bytes(bytes(250_000))
    process = start(project, "dvc", "repro", "a")
    wait_until((project / "started").exists)
    mount(project / JOURNAL, 10_000, "remount")
    (project / "wait").unlink()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert output.count("No space left on device") == 1, output
    assert runs(project) == [("FINISHED", POINTS)]


def test_outputs_without_room_are_an_error_that_leaves_the_old_ones(project: Path) -> None:
    mount(project / "artifacts", 1_000)
    (project / "ask").write_text("100000")
    code, output = run(project, "dvc", "repro", "a")
    assert code == 0, output
    (project / "ask").write_text("2000000")
    code, output = run(project, "dvc", "repro", "--force", "a")
    assert code != 0 and "No space left on device" in output and "Traceback" not in output, output
    assert (project / "artifacts" / "a" / "value").stat().st_size == 100_000
    assert [path.name for path in (project / "artifacts").iterdir()] == ["a"]
    assert [status for status, _ in runs(project)] == ["FINISHED", "FAILED"]
