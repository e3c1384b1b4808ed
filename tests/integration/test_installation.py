"""What `pip install` brings: the library alone, and a command that finds the project it is called in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.fresh_venv import Installed

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(fresh: Installed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(fresh.wheel).extractall(folder)
    return folder


def qvgen(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as from that installation: -S leaves out this environment's own, and what else it has comes last."""
    others = [path for path in sys.path if path.endswith("site-packages")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), *others])}
    script = "import sys; sys.argv[0] = 'qvgen'; sys.path.pop(0); from qvgen.command import main; main()"
    command = [sys.executable, "-S", "-c", script, *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def test_only_the_library_is_installed(fresh: Installed) -> None:
    wheel = fresh.wheel
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"qvgen"}
    (entry,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt")]
    assert "qvgen = qvgen.command:main" in zipfile.ZipFile(wheel).read(entry).decode()


def test_outside_a_project_one_line_says_where_to_run_it(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")  # a project of somebody else
    done = qvgen(installed, tmp_path, "status")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("qvgen: no project here") and done.stderr.count("\n") == 1
    done = qvgen(installed, tmp_path, "--help")
    assert done.returncode == 0 and "pull" in done.stdout and "repro" not in done.stdout


def test_inside_a_project_its_own_command_runs(installed: Path, tmp_path: Path) -> None:
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("pipelines", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "deeper").mkdir()
    done = qvgen(installed, tmp_path / "deeper", "--help")
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout and "repro" in done.stdout


def test_serving_brings_neither_git_nor_what_training_needs(fresh: Installed, tmp_path: Path) -> None:
    """The environment in which the tests of loading, serving, rolling back and the canary run."""
    code = f"""
import importlib.util, shutil, sys
from qvgen.cli.app import anywhere
import qvgen, torch, mlflow
names = ("dvc", "prefect", "dask", "pygit2", "peft", "pytest", "stages", "pipelines", "comparison")
assert [name for name in names if importlib.util.find_spec(name)] == []
assert [name for name in ("git", "dvc", "prefect") if shutil.which(name)] == []
assert not [path for path in sys.path if path.startswith({str(ROOT)!r})], sys.path
assert qvgen.__file__.startswith({str(fresh.venv)!r}), qvgen.__file__
"""
    done = subprocess.run(
        [fresh.python, "-c", code], cwd=tmp_path, env={"PATH": str(fresh.venv / "bin")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
