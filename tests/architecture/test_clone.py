"""A clone has the bytes that were committed, also where git is set up to change line ends."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["params.yaml", "stages/pack.py"])
def test_line_ends_are_as_committed_whatever_git_is_told(name: str, tmp_path: Path) -> None:
    def git(*command: str, folder: Path = tmp_path / "made") -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "core.autocrlf=true"]
        subprocess.run(["git", *identity, *command], cwd=folder, check=True, capture_output=True)

    source = tmp_path / "made"
    (source / name).parent.mkdir(parents=True)
    for path in (name, ".gitattributes"):
        (source / path).write_bytes((ROOT / path).read_bytes())
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "start")
    git("clone", "-q", str(source), str(tmp_path / "clone"))
    committed, cloned = (ROOT / name).read_bytes(), (tmp_path / "clone" / name).read_bytes()
    assert cloned == committed and b"\r" not in cloned and b"\n" in cloned
    (source / ".gitattributes").unlink()  # the test would notice: without it git does change them
    git("commit", "-qam", "without")
    git("clone", "-q", str(source), str(tmp_path / "changed"))
    assert (tmp_path / "changed" / name).read_bytes() == committed.replace(b"\n", b"\r\n")
