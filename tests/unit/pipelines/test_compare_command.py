"""`qvgen compare`: what it starts, and in which order."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.commands.compare import FILE, PAGE, RATES, compare


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Commands without the guard, and their variables."""
    found: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> SimpleNamespace:
        assert command[1:4] == ["-m", "pipelines.run.guard", "--"]
        found.append((command[6:], env))  # after the interpreter and -m
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return found


def project(root: Path) -> Path:
    (root / RATES).parent.mkdir()
    (root / RATES).write_text("{}")
    (root / "comparison/params.yaml").write_text("clips: 6")
    return root


def test_a_whole_comparison_is_a_stage_of_dvc(tmp_path: Path, started: list[tuple[list[str], dict[str, str]]]) -> None:
    assert compare(project(tmp_path), jobs=3) == 0
    assert [command for command, _ in started] == [
        ["dvc", "repro", f"{FILE}:compare"],
        ["dvc", "repro", "--single-item", "--force", f"{FILE}:report"],  # there is no page yet
    ]
    assert all(env["QVGEN_JOBS"] == "3" and env["QVGEN_EXECUTION"].startswith("comparison-") for _, env in started)


def test_six_cases_are_not_taken_for_the_whole_stage(tmp_path: Path, started: list[tuple[list[str], dict[str, str]]]) -> None:
    (project(tmp_path) / PAGE).parent.mkdir()
    (tmp_path / PAGE).touch()
    assert compare(tmp_path, jobs=1, fast=True) == 0
    assert [command for command, _ in started] == [
        ["dvc", "repro", "prepare"],
        ["comparison.run", "--fast"],
        ["dvc", "repro", "--single-item", f"{FILE}:report"],
    ]


def test_fast_needs_recorded_learning_rates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"learning_rates\.json is not there"):
        compare(tmp_path, jobs=1, fast=True)
