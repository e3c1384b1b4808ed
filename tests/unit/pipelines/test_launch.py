"""What a person reads where something is missing before a run starts."""

import subprocess
from pathlib import Path

import pytest

from pipelines.run.checkout import check_git, project_root
from pipelines.run.prefect_home import some_server
from stages.record.connection import connect, relocate


def test_a_server_that_nobody_answers_for_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://user:p@ss@127.0.0.1:9/api")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with (
        pytest.raises(ValueError, match=r"PREFECT_API_URL is http://127.0.0.1:9/api, where nobody answers"),
        some_server(tmp_path),
    ):
        pass


def test_a_folder_without_git_is_told_both_ways_out(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("")
    with pytest.raises(ValueError, match=r"git init .* core.no_scm true"):
        check_git(tmp_path)
    (tmp_path / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    check_git(tmp_path)
    (tmp_path / ".dvc/config.local").unlink()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    check_git(tmp_path)
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    (tmp_path / ".git/index").write_bytes(b"DIRC")
    with pytest.raises(ValueError, match=r"git cannot read its index in .*rm \.git/index && git reset"):
        check_git(tmp_path)


def test_a_damaged_database_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"x" * 5000)
    with pytest.raises(ValueError, match=r"mlflow\.db is damaged \(file is not a database\): put a copy of it back"):
        relocate(tmp_path / "mlflow.db", tmp_path / "mlruns")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match=r"a \? in .* ends MLflow's address"):  # which would name a file elsewhere
        connect(tmp_path / "is it?")


def test_a_folder_of_the_project_that_has_a_dvc_yaml_is_not_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stages").mkdir()
    for folder in (tmp_path, tmp_path / "stages"):
        (folder / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path / "stages")
    assert project_root() == tmp_path / "stages"
    (tmp_path / ".dvc").mkdir()
    assert project_root() == tmp_path
