"""The layers of CONTRIBUTING.md hold, and files stay short enough to read in one sitting."""

import subprocess
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[2]
MAX_LINES = 300
LONGER: dict[str, str] = {}  # path -> why it is not split


def test_import_contracts_hold(capsys: pytest.CaptureFixture[str]) -> None:
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_files_are_short() -> None:
    # Files not yet added count too, so that the rule speaks before the commit.
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    lines = {
        name: len((ROOT / name).read_text(encoding="utf-8").splitlines())
        for name in listed
        if not name.startswith("tests/") and (ROOT / name).exists()
    }
    assert "qvgen/params.py" in lines, "git lists no sources: the rule checked nothing"
    assert {name: n for name, n in lines.items() if n > MAX_LINES and name not in LONGER} == {}
    assert [name for name in LONGER if lines.get(name, 0) <= MAX_LINES] == [], "no longer long: remove from LONGER"
