"""What runs in a checkout share: the environment of their processes, and that only one goes on at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.run.checkout import environment, only_one

ROOT = Path(__file__).parents[2]
WAITING = """
from pathlib import Path
from pipelines.run.checkout import only_one
with only_one(Path(".")):
    Path("entered").touch()
"""


def test_environment_never_overrides_and_puts_this_python_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOUR", "blue")
    monkeypatch.delenv("SHAPE", raising=False)
    (tmp_path / ".env.defaults").write_text("# comment=1\nCOLOUR=red\n\nSHAPE=a=b\n")
    variables = environment(tmp_path)
    assert variables["COLOUR"] == "blue" and variables["SHAPE"] == "a=b"
    assert not any("comment" in name for name in variables)
    assert variables["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_second_run_says_who_is_first_and_waits(tmp_path: Path) -> None:
    with only_one(tmp_path):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, "-c", WAITING],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        assert f"Another run is active (process {os.getpid()}); waiting" in process.stderr.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        assert not (tmp_path / "entered").exists()
    process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "entered").exists()
    assert not (tmp_path / ".qvgen" / "repro.pid").exists()
