"""`qvgen repro` around a real DVC project of one slow stage: two at once, Ctrl-C, the environment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.repro import INTERRUPTED, environment, only_one, repro

ROOT = Path(__file__).parents[2]
STAGE = """
import os, pathlib, sys, time
pathlib.Path("started").touch()
try:
    time.sleep(float(pathlib.Path("seconds").read_text()))
except KeyboardInterrupt:
    pathlib.Path("interrupted").touch()
    sys.exit(130)
pathlib.Path("out").write_text(os.environ["COLOUR"])
"""
DAG = """
stages:
  slow:
    cmd: python slow.py
    deps: [slow.py, seconds]
    outs: [out]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    for name, content in (("slow.py", STAGE), ("dvc.yaml", DAG), ("seconds", "0"), (".env.defaults", "COLOUR=red\n")):
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.fixture
def start(project: Path) -> Iterator:
    """Starts `repro(project)` in a process of its own; whatever still runs at the end is killed."""
    started: list[subprocess.Popen] = []

    def go() -> subprocess.Popen:
        code = "import sys; from pathlib import Path; from pipelines.repro import repro; sys.exit(repro(Path('.')))"
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=project,
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield go
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait()


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.05)


def test_runs_the_stages_with_the_defaults_of_the_environment(project: Path, monkeypatch) -> None:
    monkeypatch.delenv("COLOUR", raising=False)
    assert repro(project, ["-q"]) == 0
    assert (project / "out").read_text() == "red"
    (project / "slow.py").write_text("raise SystemExit(3)")
    assert repro(project, ["-q"]) not in (0, INTERRUPTED)
    assert not (project / ".qvgen" / "repro.pid").exists()


def test_environment_never_overrides_and_puts_this_python_first(project: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLOUR", "blue")
    (project / ".env.defaults").write_text("# comment=1\nCOLOUR=red\n\nSHAPE=a=b\n")
    variables = environment(project)
    assert variables["COLOUR"] == "blue" and variables["SHAPE"] == "a=b"
    assert not any("comment" in name for name in variables)
    assert variables["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


@pytest.mark.slow
def test_ctrl_c_reaches_the_stage_and_the_next_run_finishes(project: Path, start) -> None:
    (project / "seconds").write_text("60")
    process = start()
    wait_for(project / "started")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED
    assert "run it again" in output
    assert (project / "interrupted").exists() and not (project / "out").exists()
    (project / "seconds").write_text("0")
    assert repro(project, ["-q"]) == 0
    assert (project / "out").exists()


@pytest.mark.slow
def test_a_second_run_says_who_is_first_and_waits(project: Path, start) -> None:
    with only_one(project):
        process = start()
        assert process.stdout is not None
        assert f"Another run is active (process {os.getpid()}); waiting" in process.stdout.readline()
        time.sleep(1)
        assert process.poll() is None and not (project / "started").exists()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (project / "out").exists()
