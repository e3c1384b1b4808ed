"""`qvgen audit` where data and weights are no longer in this machine's cache: a folder, and a real S3 API over HTTP."""

import shutil
from pathlib import Path

import pytest

from pipelines.audit.report import audit
from tests.support import audited_project as toy
from tests.support import services
from tests.support.audited_project import failed

pytestmark = [pytest.mark.integration, pytest.mark.slow]

BYTES = {"data", "packed model", "sha256", "workspace"}  # the checks that read them


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return toy.make_with_champion(tmp_path)


def push(project: Path, address: str, **settings: str) -> None:
    """To a remote that this checkout alone knows; then the cache is gone."""
    commands = [("remote", "add", "-d", "--local", "store", address)]
    commands += [("remote", "modify", "--local", "store", name, value) for name, value in settings.items()]
    for command in (*commands, ("push",)):
        code, output = toy.run(project, "dvc", *command)
        assert code == 0, output
    shutil.rmtree(project / ".dvc/cache")


def test_a_folder(project: Path, tmp_path: Path) -> None:
    push(project, str(tmp_path / "remote"))
    assert failed(project) == {}
    shutil.rmtree(tmp_path / "remote")
    faults = failed(project)
    assert faults.keys() == BYTES
    assert " is missing" in faults["data"] and str(tmp_path / "remote") in faults["data"]


def test_s3_is_audited_and_rebuilt_from_and_when_silent_not_called_empty(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with services.s3(tmp_path / "s3", "qvgen") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        push(project, "s3://qvgen/dvc", endpointurl=variables["AWS_ENDPOINT_URL"])
        report = audit(project, "qvgen@champion", rebuild_too=True)
        assert report.ok and "rebuild" in {check.name for check in report.checks}, str(report)
        shutil.rmtree(project / ".dvc/cache")  # the rebuild has put into it what it pulled
        assert "dvc pull assets/raw.txt" in audit(project, "qvgen@champion").rebuild
    faults = failed(project)
    assert faults.keys() == BYTES
    assert all("s3://qvgen/dvc/files/md5 cannot be asked" in faults[name] for name in ("data", "packed model"))
    assert "is missing" not in str(faults)
