"""What `pip install` brings: the library alone, and a command that finds the project it is called in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, without the kernels, which take a minute to compile, and without network."""
    pytest.importorskip("scikit_build_core", reason="not installed: pip install scikit-build-core (it builds the wheel)")
    source, out = tmp_path_factory.mktemp("source") / "qvgen", tmp_path_factory.mktemp("wheel")
    every = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(every, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in listed:
        if name and (ROOT / name).is_file() and name.split("/")[0] not in ("assets", "reports", "tests", "docs", "bench"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["-C", "wheel.cmake=false", "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("qvgen-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def qvgen(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as from that installation: -S leaves out this environment's own, and what else it has comes last."""
    others = [path for path in sys.path if path.endswith("site-packages")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), *others])}
    script = "import sys; sys.argv[0] = 'qvgen'; sys.path.pop(0); from qvgen.command import main; main()"
    command = [sys.executable, "-S", "-c", script, *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def test_only_the_library_is_installed(wheel: Path) -> None:
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
