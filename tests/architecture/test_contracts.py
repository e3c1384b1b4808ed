"""The layers of CONTRIBUTING.md hold, files stay short enough to read in one sitting, and folders small enough to scan."""

import subprocess
from collections import Counter
from functools import cache
from pathlib import Path, PurePosixPath

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[2]
MAX_LINES = 300
LONGER: dict[str, str] = {}  # path -> why it is not split
MAX_FILES = 12  # source files in a folder, its face (__init__.py) not counted
FULLER = {"qvgen/methods": "one card for each of the twelve methods, besides what a card is and the list of them"}
SOURCES = ("*.py", "*.cpp", "*.h")
MAX_COLUMNS = 120  # of Markdown, where the line is prose
WIDER = {
    "LOG.md": "what was written when an experiment was made stays as it was written",
    "assets/tiny-wan/README.md": "its sha256 is on record",
}


@cache
def tracked(*patterns: str) -> tuple[str, ...]:
    """Files of git, those not yet added too, so that the rules speak before the commit."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    return tuple(name for name in listed if name and (ROOT / name).is_file())


def sources() -> list[PurePosixPath]:
    """Source files outside the tests, without the faces of packages."""
    found = [PurePosixPath(name) for name in tracked(*SOURCES) if not name.startswith("tests/")]
    assert PurePosixPath("qvgen/params.py") in found, "git lists no sources: the rules checked nothing"
    return [path for path in found if path.name != "__init__.py"]


def test_import_contracts_hold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # It would turn off every logger of this process, and tests of warnings after it would fail.
    monkeypatch.setattr("importlinter.cli._configure_logging", lambda verbose: None)
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_files_are_short() -> None:
    python = [str(path) for path in sources() if path.suffix == ".py"]
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in python}
    assert {name: n for name, n in lines.items() if n > MAX_LINES and name not in LONGER} == {}
    assert [name for name in LONGER if lines.get(name, 0) <= MAX_LINES] == [], "no longer long: remove from LONGER"


def test_folders_are_small() -> None:
    files = Counter(str(path.parent) for path in sources())
    assert {folder: n for folder, n in files.items() if n > MAX_FILES and folder not in FULLER} == {}
    assert [folder for folder in FULLER if files[folder] <= MAX_FILES] == [], "no longer full: remove from FULLER"


def test_a_prefix_is_a_folder() -> None:
    """Of two files `audit_data` and `audit_lineage`, `audit` is the name of a folder."""
    named = {(path.parent, path.stem) for path in sources()}  # a header and its source count once
    prefixes = Counter((folder, stem.split("_")[0]) for folder, stem in named if "_" in stem.strip("_"))
    assert [f"{folder}/{prefix}_*" for (folder, prefix), n in prefixes.items() if n > 1] == []


@pytest.mark.parametrize("name", [name for name in tracked("*.md") if name not in WIDER])
def test_prose_fits_the_screen(name: str) -> None:
    """Lines of Markdown, but for tables, code and pictures, which cannot be wrapped."""
    inside, long = False, []
    for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), start=1):
        inside ^= line.lstrip().startswith("```")
        if len(line) > MAX_COLUMNS and not inside and not line.lstrip().startswith(("|", "![", "    ", "<!--")):
            long.append(number)
    assert long == []
