"""The red team's table: single changes of a project that passes `qvgen audit`, each with the check that must name it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.audit.report import audit
from tests.support import audited_project as toy
from tests.support.tampers.database import CHANGED, DELETED
from tests.support.tampers.files import BYTES, GIT
from tests.support.tampers.spoiled import Spoiled, Tamper

pytestmark = [pytest.mark.integration, pytest.mark.slow]

TAMPERS: dict[str, Tamper] = {
    f"{kind}: {name}": tamper
    for kind, table in (("deleted", DELETED), ("changed", CHANGED), ("git", GIT), ("bytes", BYTES))
    for name, tamper in table.items()
}


@pytest.fixture(scope="module", autouse=True)
def _embedded_tracking() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="module")
def audited(champion: Path) -> Path:
    assert states(champion) == {}, "or no tamper would be noticed"
    return champion


def states(root: Path) -> dict[str, str]:
    """Checks that do not pass -> detail; {"error": message} for an audit that refuses."""
    try:
        return {check.name: check.detail for check in audit(root, "qvgen@champion").checks if not check.ok}
    except ValueError as error:
        return {"error": str(error)}


@pytest.mark.parametrize("name", TAMPERS)
def test_a_tamper_is_named(name: str, audited: Path, tmp_path: Path) -> None:
    tamper = TAMPERS[name]
    root = toy.copy(audited, tmp_path / "project")
    tamper.change(Spoiled(root))
    found = states(root)
    if tamper.check:
        assert tamper.check in found, found
    else:
        assert tamper.why and found == {}


def test_there_are_at_least_a_hundred() -> None:
    assert len(TAMPERS) >= 100
