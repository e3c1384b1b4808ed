"""What a push to Hugging Face would send, what it refuses to, and that it sends nothing without being asked and allowed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.commands.push import measured_in_project
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

        def create_commit(self, repo_id: str, operations: Any, **options: Any) -> Any:
            calls.append((repo_id, operations))
            return SimpleNamespace(commit_url="https://address/of/the/commit")

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
    planned = plan(folder, "someone/tiny-wan", "## Measured\n\nslowly")
    assert push(planned, private=True) == "https://address/of/the/commit"
    (repository, options), (again, operations) = sent
    assert repository == again == "someone/tiny-wan" and options["private"] and options["exist_ok"]
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    content = {}
    for operation in operations:
        with operation.as_file() as file:
            content[operation.path_in_repo] = file.read()
    assert sorted(content) == sorted(names) == sorted(planned.files)
    card = (folder / "README.md").read_bytes() + b"\n## Measured\n\nslowly\n"
    assert all(content[name] == (card if name == "README.md" else (folder / name).read_bytes()) for name in names)
    assert {name: len(data) for name, data in content.items()} == planned.files


def test_the_card_of_a_project_has_its_measurements_and_lineage(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "project"
    (root / "metrics").mkdir(parents=True)
    (root / "dvc.yaml").touch()
    shutil.copytree(folder, root / "artifacts/packed")
    monkeypatch.chdir(root)
    assert measured_in_project(root / "artifacts/packed") == ""
    (root / "metrics/evaluate.json").write_text(json.dumps({"prompts": 7, "full_precision": {}, "packed": {"psnr_db": 31.25}}))
    (root / "metrics/register.json").write_text(json.dumps({"name": "ours", "version": 3, "run_id": "abc123"}))
    text = measured_in_project(root / "artifacts/packed")
    assert "| PSNR, dB | " in text and "31.25" in text and "version 3 of ours, run abc123" in text
    assert measured_in_project(folder) == ""
    monkeypatch.chdir(folder)
    assert measured_in_project(root / "artifacts/packed") == ""


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
