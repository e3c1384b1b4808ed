"""What a push to Hugging Face would send, what it refuses to, and that it sends nothing without being asked and allowed."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from qvgen.hub.push import plan, push
from tests.support.packed_model import make_packed

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packed(tmp_path_factory.mktemp("push"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "packed"))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the hub; there are credentials."""
    calls: list[Any] = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append((repo_id, options))

        def upload_folder(self, **options: Any) -> str:
            calls.append(options)
            return "https://address/of/the/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return calls


def test_a_dry_run_lists_everything_and_sends_nothing(folder: Path, sent: list[Any]) -> None:
    (folder / ".cache").mkdir()
    (folder / ".cache/x.json").write_text("{}")
    done = CliRunner().invoke(app, ["push", str(folder), "someone/tiny-wan", "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0 and sent == []
    files = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    for path in files:
        name, size = str(path.relative_to(folder)), f"{path.stat().st_size:,}"
        assert any(line.split() == [name, size] for line in done.output.splitlines()), name
    total = f"{sum(path.stat().st_size for path in files):,}"
    assert "model repository someone/tiny-wan" in done.output and f"together {total} bytes" in " ".join(done.output.split())
    assert ".cache" not in done.output and "nothing was sent" in done.output


def test_what_is_sent_is_what_was_shown(folder: Path, sent: list[Any]) -> None:
    planned = plan(folder, "someone/tiny-wan")
    assert push(planned, private=True) == "https://address/of/the/commit"
    (repository, options), upload = sent
    assert repository == upload["repo_id"] == "someone/tiny-wan" and options["private"] and options["exist_ok"]
    assert upload["folder_path"] == folder
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    chosen = huggingface_hub.utils.filter_repo_objects([*names, ".git/x"], allow_patterns=upload["allow_patterns"])
    assert sorted(chosen) == sorted(names) == sorted(planned.files)


def test_without_credentials_nothing_is_created(folder: Path, sent: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="no credentials for Hugging Face"):
        push(plan(folder, "someone/tiny-wan"), private=False)
    assert sent == []


def test_a_folder_that_is_not_whole_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is no repository of Hugging Face"):
        plan(folder, "https://huggingface.co/someone/tiny-wan")
    (folder / "vae/old.bin").touch()
    with pytest.raises(ValueError, match=r"vae/old\.bin is a pickle"):
        plan(folder, "someone/tiny-wan")
    (folder / "vae/old.bin").unlink()
    (folder / "vae/notes.txt").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"notes\.txt is a link to /etc/hostname"):
        plan(folder, "someone/tiny-wan")
    (folder / "vae/notes.txt").unlink()
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    monkeypatch.setenv("QVGEN_VERIFY", "0")  # of no weight here
    with pytest.raises(ValueError, match="sha256 is"):
        plan(folder, "someone/tiny-wan")
    with pytest.raises(ValueError, match=r"no model_index\.json|not a diffusers pipeline"):
        plan(folder / "vae", "someone/tiny-wan")
