"""What a person reads where something is missing before a run starts."""

import subprocess
from pathlib import Path

import pytest

from pipelines.run.checkout import check_git
from pipelines.run.prefect_home import some_server


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
