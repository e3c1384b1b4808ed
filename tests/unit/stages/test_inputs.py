"""artifacts/inputs.json: what fetch.source, prepare.folder and evaluate.prompts_file hold, by content, at the cost of a look
at each file."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages import observe
from stages.runtime import inputs
from stages.runtime.inputs import Inputs


def project(root: Path) -> Path:
    (root / "clips/more").mkdir(parents=True)
    (root / "model/vae").mkdir(parents=True)
    for name in ("clips/a.mp4", "clips/more/b.mp4", "clips/captions.csv", "model/model_index.json", "model/vae/config.json"):
        (root / name).write_text(name)
    (root / "prompts.txt").write_text("a dog\n")
    params = {"fetch": {"source": "model"}, "prepare": {"folder": "clips"}, "evaluate": {"prompts_file": "prompts.txt"}}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


def sha256(root: Path) -> dict[str, Any]:
    return {stage: found["sha256"] for stage, found in Inputs(root).describe().items()}


def test_content_names_and_files_count_and_nothing_else(tmp_path: Path) -> None:
    root = project(tmp_path)
    first = Inputs(root).describe()
    assert {stage: (found["files"], found["bytes"]) for stage, found in first.items()} == {
        "fetch": (2, 43),
        "prepare": (3, 45),
        "evaluate": (1, 6),
    }

    before = sha256(root)
    os.utime(root / "clips/a.mp4", (1, 1))
    (root / "clips/.cache").write_text("hidden")
    (root / "model/train.py").write_text("not of the pipeline")
    (root / "clips/more/above").symlink_to(root / "clips")
    assert sha256(root) == before

    for change in (
        lambda: (root / "clips/a.mp4").write_text("CLIPS/A.MP4"),  # of the same size
        lambda: (root / "clips/more/b.mp4").rename(root / "clips/more/c.mp4"),
        lambda: (root / "clips/new.mp4").write_text(""),
    ):
        change()
        after = sha256(root)
        assert after["prepare"] != before["prepare"] and after["fetch"] == before["fetch"]
        before = after
    (root / "model/vae/config.json").write_text("{}")
    assert sha256(root)["fetch"] != before["fetch"] and sha256(root)["prepare"] == before["prepare"]

    before = sha256(root)
    os.utime(root / "prompts.txt", (1, 1))
    assert sha256(root) == before
    (root / "prompts.txt").write_text("a cat\n")
    assert {stage for stage, found in sha256(root).items() if found != before[stage]} == {"evaluate"}
    (root / "prompts.txt").unlink()
    assert Inputs(root).describe()["evaluate"]["files"] == 0


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, read = project(tmp_path), []
    original = inputs._sha256
    monkeypatch.setattr(inputs, "_sha256", lambda path: (read.append(path.name), original(path))[1])
    observe.write(root)
    assert len(read) == 6
    text = (root / observe.INPUTS).read_text()
    observe.write(root)
    assert len(read) == 6 and (root / observe.INPUTS).read_text() == text
    (root / "clips/a.mp4").write_text("other")
    observe.write(root)
    assert read[6:] == ["a.mp4"]
    (root / inputs.SEEN).write_text("{")  # damaged: everything is read again
    observe.write(root)
    assert len(read) == 13


@pytest.mark.parametrize(
    "text",
    [
        *("", "fetch: 3\n", "a: [", "fetch: {source: org/name}\nprepare: {folder: null}\n", "prepare: {folder: 7}\n"),
        "evaluate: {prompts_file: folder}\n",
    ],
)
def test_what_names_no_folder_has_no_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "folder").mkdir()
    assert {found["files"] for found in Inputs(tmp_path).describe().values()} == {0}
