import json
from pathlib import Path

import pytest

from pipelines.commands.results import ABSENT, COLUMNS, markdown_table, rows, show

QUALITY = {"colour": 1.0, "direction": 0.975, "digit": 0.8}
DISTANCE = {"psnr_db": 24.126, "ssim": 0.9123, "velocity_mse": 0.0213, "latent_mse": 0.31}
EVALUATE = {"full_precision": QUALITY, "packed": QUALITY | DISTANCE, "prompts": 200}
BASELINES = {"rtn": QUALITY | DISTANCE | {"psnr_db": 15.0}, "mse": QUALITY | DISTANCE | {"psnr_db": 16.0}}
BENCHMARK = {
    "bytes": {"fp32": 6_000_000, "bf16": 3_000_000, "packed": 1_000_000},
    "step_ms": {"fp32": 7.0, "bf16": 9.0, "packed": 3.5},
    "peak_rss_mb": {"fp32": 500.0, "bf16": 490.0, "packed": 480.0},
    "kernel": "reference",
    "device": "a machine",
    "video_s": {"fp32": 1.0, "bf16": 1.2, "packed": 0.5},
    "bytes_ratio_wan2.1_1.3b": 0.2625,
}


def cell(metrics: dict, row: str, column: str) -> str:
    return {r.name: dict(zip(COLUMNS, r.cells, strict=True)) for r in rows(metrics)}[row][column]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "metrics").mkdir()
    for name, content in (("evaluate", EVALUATE), ("baselines", BASELINES), ("benchmark", BENCHMARK)):
        (tmp_path / "metrics" / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_every_number_stands_in_its_own_column() -> None:
    metrics = {"evaluate": EVALUATE, "baselines": BASELINES, "benchmark": BENCHMARK}
    assert cell(metrics, "direction right", "fp32") == cell(metrics, "direction right", "packed") == "97.5 %"
    assert [cell(metrics, "PSNR, dB", c) for c in COLUMNS] == [ABSENT, ABSENT, "24.13", "15.00", "16.00"]
    assert [cell(metrics, "size over bf16", c) for c in COLUMNS] == ["200.0 %", "100.0 %", "33.3 %", ABSENT, ABSENT]
    assert cell(metrics, "denoising step, ms", "packed") == "3.5"
    assert cell(metrics, "peak memory, MB", "bf16") == "490"


def test_what_was_not_measured_is_left_out() -> None:
    names = [row.name for row in rows({"evaluate": EVALUATE})]
    assert "PSNR, dB" in names and "denoising step, ms" not in names
    plain = {"evaluate": {"full_precision": {}, "packed": DISTANCE, "prompts": 3}}  # prompts of another data set
    assert "digit right" not in [row.name for row in rows(plain)]
    own = {"evaluate": {"full_precision": {"ball": 0.9}, "packed": DISTANCE | {"ball": 0.8125}, "prompts": 3}}
    assert cell(own, "ball", "packed") == "0.8125", "a measure that only this data set has"


def test_show_prints_table_pictures_and_next_commands(project: Path, capsys) -> None:
    pictures = project / "artifacts" / "evaluation"
    pictures.mkdir(parents=True)
    (pictures / "contact_sheet.png").touch()
    (pictures / "00-a.mp4").touch()
    (project / "metrics" / "baselines.json").unlink()
    show(project)
    text = capsys.readouterr().out
    for part in ("24.13", "33.3 %", "26.2 %", "a machine", "contact_sheet.png", "00-a.mp4", "qvgen generate --model"):
        assert part in text
    assert "Not measured yet: baselines" in text


def test_markdown_names_the_command_behind_each_number(project: Path) -> None:
    lines = markdown_table(project).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert all("`dvc repro" in line for line in table[2:])


def test_nothing_measured_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make repro"):
        show(tmp_path)
