"""Models by name, from a real registry: the nearest place that has the bytes, checked, kept, and used without the registry."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.run import nearby
from qvgen.cache import cache_folder
from qvgen.hub.resolve import model_folder, pull
from qvgen.models.tiny import TINY_CLIP, tiny_pipeline
from tests.support.registered import Line, make_wish, read_folder, register, using

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SMALL = {"model_index.json": b"{}", "transformer/config.json": b"[]", "transformer/weights.safetensors": b"w" * 5000}


def test_a_video_of_a_registered_model(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`qvgen generate` gives the same bytes for models:/... as for the folder that was registered, and `qvgen pull` that
    folder."""
    from pipelines import cli

    source = tiny_pipeline("wan", tmp_path / "wan")
    settings = {**vars(TINY_CLIP), "inference_steps": 2, "guidance_scale": 2.0, "fps": 8}
    (source / "generation.json").write_text(json.dumps(settings))
    content = read_folder(source)
    register(MlflowClient(mlflow_server), make_wish(tmp_path, "video", content))
    monkeypatch.chdir(tmp_path)
    with using(mlflow_server, tmp_path / "cache"):
        made = []
        for model in ("wan", "models:/video@challenger", "models:/video/1"):
            out = tmp_path / f"{len(made)}.mp4"
            monkeypatch.setattr(sys, "argv", ["qvgen", "generate", "--model", model, "--prompt", "a", "--out", str(out)])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert not stop.value.code
            made.append(out.read_bytes())
        assert made[0] == made[1] == made[2]
        assert read_folder(pull("models:/video@challenger", tmp_path / "pulled")) == content
        with pytest.raises(ValueError, match="is there already"):
            pull("models:/video@challenger", tmp_path / "pulled")


def test_two_processes_at_once_and_then_without_the_registry(mlflow_server: str, tmp_path: Path) -> None:
    line = Line(mlflow_server)
    wish = make_wish(tmp_path, "offline", SMALL)
    register(MlflowClient(mlflow_server), wish)
    code = "from qvgen.hub.resolve import model_folder; print(model_folder('models:/offline@challenger'))"
    with using(line.address, tmp_path / "cache"):
        started = [
            subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)
        ]
        folders = {process.communicate(timeout=120)[0].strip() for process in started}
        assert [process.returncode for process in started] == [0, 0] and len(folders) == 1
        assert read_folder(Path(folders.pop())) == SMALL
        line.cut()
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert read_folder(Path(done.stdout.strip())) == SMALL
        assert "does not answer" in done.stderr and "is version 1, as it last said" in done.stderr
        with pytest.raises(ValueError, match=r"does not answer.*never used here"):
            model_folder("models:/other@challenger")


def test_damage_is_seen_and_mended_and_nothing_false_is_kept(
    mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(mlflow_server)
    version = register(client, make_wish(tmp_path, "damaged", SMALL))
    monkeypatch.chdir(tmp_path)
    with using(mlflow_server, tmp_path / "cache"):
        folder = model_folder("models:/damaged/1")
        (folder / "transformer/weights.safetensors").write_bytes(b"w" * 4999 + b"!")
        (folder / "more.bin").write_bytes(b"!")
        assert model_folder("models:/damaged/1") == folder and read_folder(folder) == SMALL
        (folder / "transformer/weights.safetensors").unlink()
        bad = tmp_path / "weights.safetensors"
        bad.write_bytes(b"x" * 5000)
        client.log_model_artifact(version.source.removeprefix("models:/"), str(bad), "artifacts/packed/transformer")
        with pytest.raises(ValueError, match="nowhere to be had") as caught:
            model_folder("models:/damaged/1")
        assert "the DVC remote: transformer/weights.safetensors: the version names none" in str(caught.value)
        assert f"MLflow at {mlflow_server}: transformer/weights.safetensors: has other bytes" in str(caught.value)
        assert not folder.exists()


def test_a_linked_model_comes_from_the_dvc_remote_without_dvc(
    mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layout is that of DVC's cache."""
    wish = make_wish(tmp_path, "remote", SMALL, upload="link", **{"dvc.remote": str(tmp_path)})
    register(MlflowClient(mlflow_server), wish)
    monkeypatch.chdir(tmp_path)
    with using(mlflow_server, tmp_path / "cache"):
        assert read_folder(model_folder("models:/remote@challenger")) == SMALL


def test_the_project_at_hand_comes_first(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packed folder where that is the model, used in place; else DVC's cache there."""
    project = tmp_path / "project"
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=project, check=True)
    (project / "params.yaml").write_text("")
    (project / "dvc.yaml").write_text("stages: {}\n")
    wish = make_wish(tmp_path, "near", SMALL, upload="link")
    register(MlflowClient(mlflow_server), wish)
    (project / ".dvc/cache").mkdir()
    (tmp_path / "files").rename(project / ".dvc/cache/files")
    monkeypatch.chdir(project)
    nearby.offer()
    with using(mlflow_server, tmp_path / "cache"):
        kept = model_folder("models:/near/1")
        assert kept.is_relative_to(cache_folder()) and read_folder(kept) == SMALL
        (project / "artifacts").mkdir()
        (tmp_path / "packed").rename(project / "artifacts/packed")
        assert model_folder("models:/near/1") == project / "artifacts/packed"
        (project / "artifacts/packed/model_index.json").write_bytes(b"{ }")
        assert model_folder("models:/near/1") == kept
