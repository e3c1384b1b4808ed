"""Several pieces of work at a time, each in a process that does not outlive who started it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil

from comparison.processes import run_all

ROOT = Path(__file__).parents[3]
PATIENCE = 60  # seconds, on a busy machine


def write(path: Path, wait: float = 0.0) -> None:
    print("written")
    path.write_text(f"{os.getpid()} {time.time()}")
    time.sleep(wait)
    path.with_suffix(".end").write_text(str(time.time()))


def fail() -> None:
    raise ValueError("no such thing")


def test_each_runs_in_a_process_of_its_own_and_a_failure_takes_none_with_it(tmp_path: Path) -> None:
    work = {"a": partial(write, tmp_path / "a"), "bad": fail, "b": partial(write, tmp_path / "b")}
    assert run_all(work, 2, tmp_path / "logs") == ["bad"]
    pids = {(tmp_path / name).read_text().split()[0] for name in ("a", "b")}
    assert len(pids | {str(os.getpid())}) == 3
    assert (tmp_path / "logs/a.log").read_text() == "written\n"
    assert "no such thing" in (tmp_path / "logs/bad.log").read_text()


def test_one_at_a_time_in_order(tmp_path: Path) -> None:
    assert run_all({name: partial(write, tmp_path / name, 0.5) for name in ("a", "b")}, 1, tmp_path / "logs") == []
    assert float((tmp_path / "b").read_text().split()[1]) >= float((tmp_path / "a.end").read_text())


def test_two_at_a_time(tmp_path: Path) -> None:
    """Each waits for the other's file."""
    work = {name: partial(meet, tmp_path / name, tmp_path / other) for name, other in (("a", "b"), ("b", "a"))}
    assert run_all(work, 2, tmp_path / "logs") == []


def meet(own: Path, other: Path) -> None:
    own.touch()
    until(other.exists)


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "from functools import partial; from pathlib import Path; from comparison.processes import run_all;"
        "from tests.unit.comparison.test_processes import write;"
        f"run_all({{'a': partial(write, Path({str(tmp_path / 'a')!r}), 600)}}, 1, Path({str(tmp_path)!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until(lambda: (tmp_path / "a").is_file() and (tmp_path / "a").read_text() != "")
    child = psutil.Process(int((tmp_path / "a").read_text().split()[0]))
    parent.kill()
    parent.wait()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert not (tmp_path / "a.end").exists()


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
