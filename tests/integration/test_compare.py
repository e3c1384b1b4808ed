"""Cases of the comparison run for real, in processes of their own, on a two-layer model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from comparison.cases import Case
from comparison.fingerprint import FILE, SETTINGS, write_sources
from comparison.run import run_cases
from comparison.store import read_clips, read_result

ROOT = Path(__file__).parents[2]
CASES = [Case("rtn", "W4A4", 0), Case("kd", "W3A3", 100, percent=50)]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A project with a tiny model and its data; all that `run_cases` asks of a stage."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("QVGEN_EXECUTION", "one")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    write_sources("wan", tmp_path / "artifacts")
    (tmp_path / "comparison").mkdir()
    (tmp_path / FILE).write_text((ROOT / FILE).read_text())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(SETTINGS | {"method": "rtn"}))
    write_settings(tmp_path, revision=1)
    facts = SimpleNamespace(
        address="comparison/dvc.yaml:compare", command="x", deps={"artifacts/model": "m", "artifacts/data": "d"}
    )
    return SimpleNamespace(root=tmp_path, home=tmp_path, facts=facts)


def write_settings(root: Path, revision: int) -> None:
    settings = {"revisions": {"rtn": revision, "kd": 1}, "overrides": {"evaluate": {"prompts": 1}}, "main_prompts": 2}
    (root / "comparison/params.yaml").write_text(yaml.safe_dump(settings | {"clips": 1, "variants": {}}))


@pytest.mark.slow
def test_a_case_runs_once_until_its_revision_is_raised(stage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cases(stage, CASES, 2) == [], logs(stage.root)
    done = [line.split()[2] for line in capsys.readouterr().out.splitlines()]
    assert done[0] == "full_precision" and set(done[1:]) == {case.name for case in CASES}
    results = {case: read_result(stage.root / f"comparison/results/{case.name}.json") for case in CASES}
    untrained, tuned = (results[case] or {} for case in CASES)
    assert untrained["scores"]["velocity_mse"] > 0 and len(untrained["scores"]["psnr_db_by_prompt"]) == 1
    assert tuned["made"]["params"]["qat.learning_rate"] == SETTINGS["qat"]["learning_rate"] / 2
    assert tuned["scores"]["tuning_psnr_db"] > 0 and tuned["scores"]["steps"] == 7
    clips = read_clips(stage.root / "comparison/clips/rtn-W4A4-0.safetensors")
    assert clips is not None and clips[1].shape == (1, 3, 9, 32, 32)
    journals = [
        json.loads(path.read_text().splitlines()[0]) for path in (stage.root / ".qvgen/journal").glob("*-compare@*.jsonl")
    ]
    assert {start["name"] for start in journals} == {f"compare@{name}" for name in done}
    assert {start["pipeline"] for start in journals} == {"pipeline-one"}

    assert run_cases(stage, CASES, 2) == [] and capsys.readouterr().out == ""
    write_settings(stage.root, revision=2)
    assert run_cases(stage, CASES, 1) == []
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["rtn-W4A4-0"]  # not the reference either


def logs(root: Path) -> str:
    return "\n".join(path.read_text() for path in (root / ".qvgen/logs").glob("*.log"))
