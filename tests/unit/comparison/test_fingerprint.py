"""Whether the methods still behave as when the comparison's results were measured."""

from pathlib import Path

import pytest

from comparison.cases import read_settings, scored_cases, tuning_cases
from comparison.fingerprint import ERROR_TOLERANCE, TOLERANCE, measure_all, moved, read_fingerprints
from qvgen.methods.registry import METHODS

ROOT = Path(__file__).parents[3]
REMEDY = (
    "If that is meant: raise their `revisions` in comparison/params.yaml, so that these cases run again, and record the new "
    "behaviour with `python -m comparison.fingerprint --record`."
)


@pytest.mark.slow
def test_no_method_has_moved() -> None:
    settings = read_settings(ROOT)
    cases = [*tuning_cases(settings), *scored_cases(settings)]
    found = moved(read_fingerprints(ROOT), measure_all())
    lines = [
        f"{m}: {'; '.join(what)}\n  cases: {', '.join(c.name for c in cases if c.method == m)}" for m, what in found.items()
    ]
    assert not found, "\n".join(["these methods behave otherwise than when their cases were measured:", *lines, REMEDY])


def test_every_method_has_a_fingerprint_and_a_revision() -> None:
    assert read_fingerprints(ROOT).keys() == METHODS.keys() == read_settings(ROOT)["revisions"].keys()


def test_what_counts_as_moved() -> None:
    before = {"kd": {"wan": {"first_loss": 0.5, "final_loss": 0.5}}, "rtn": {"wan": {"packed_bytes": 40.0}}}

    def lines(name: str, factor: float) -> list[str]:
        return moved(before, before | {"kd": {"wan": before["kd"]["wan"] | {name: 0.5 * factor}}}).get("kd", [])

    assert lines("first_loss", 1 + TOLERANCE / 2) == lines("final_loss", 1 + ERROR_TOLERANCE / 2) == []
    assert lines("first_loss", 1 + 2 * TOLERANCE) == [f"wan.first_loss: 0.5, now {0.5 * (1 + 2 * TOLERANCE)}"]
    assert len(lines("final_loss", 1 + 2 * ERROR_TOLERANCE)) == 1
    assert moved(before, {"kd": before["kd"]}) == {"rtn": ["wan.packed_bytes: 40.0, now None"]}
