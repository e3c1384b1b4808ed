"""docs/compatibility.md names a test for each row, and those tests are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/compatibility.md"
LEAST = 40  # rows


def rows() -> list[list[str]]:
    """Cells of each row below a header."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if not re.match(r"\|[-|]+$|\| condition", line)
    ]


def test_every_row_names_tests_that_exist() -> None:
    found = rows()
    assert len(found) >= LEAST, "the table was not read"
    for condition, happens, tests in found:
        assert happens, condition
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests)
        assert named and len(named) == tests.count("::"), f"{condition}: no test, or one that is not written as FILE::NAME"
        for file, name in named:
            assert (ROOT / file).is_file(), f"{condition}: {file} is not there"
            text = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{condition}: {file} has no {name}"


def test_the_map_leads_to_it() -> None:
    assert f"docs/{PAGE.name}" in (ROOT / "README.md").read_text(encoding="utf-8")
