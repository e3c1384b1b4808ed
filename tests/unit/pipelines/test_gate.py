import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.champion.gate import Rule, evaluate_gate
from qvgen.params import load_params
from stages.register import MEASURED, leaves

ROOT = Path(__file__).parents[3]
GATE = load_params(ROOT / "params.yaml").gate
MARGIN = 0.05  # of a limit: less would make the gate a matter of luck


def measured(**changes: float) -> dict[str, float]:
    """The committed metrics as stage register records them, with changes; "__" stands for a dot."""
    numbers: dict[str, float] = {}
    for path in MEASURED:
        numbers |= leaves(json.loads((ROOT / path).read_text()))[0]
    return numbers | {name.replace("__", "."): value for name, value in changes.items()}


def failures(challenger: dict[str, float], champion: dict[str, float] | None = None, **options: Any) -> list[str]:
    return [rule.name for rule in evaluate_gate(GATE, challenger, champion, **options) if not rule.ok]


def test_the_committed_model_passes_with_a_margin_and_against_itself() -> None:
    rules = evaluate_gate(GATE, measured(), measured())
    assert len(rules) == 13 and all(rule.ok for rule in rules)
    for rule in evaluate_gate(GATE, measured(), None):
        assert abs(rule.value - rule.limit) > MARGIN * rule.limit, str(rule)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"packed__digit": 0.97}, "digit drop"),
        ({"packed__psnr_db": 26.9}, "psnr_db"),
        ({"packed__velocity_mse": 0.06}, "velocity_mse"),
        ({"bytes__packed": 1.5e6}, "bytes over bf16"),
        ({"speedup__over_bf16": 0.99}, "speedup over bf16"),
    ],
)
def test_each_limit_alone_keeps_a_model_out(changes: dict[str, float], rule: str) -> None:
    assert failures(measured(**changes)) == [rule]


def test_a_champion_raises_the_bar() -> None:
    own = measured()
    better = measured(
        packed__psnr_db=own["packed.psnr_db"] + 2 * GATE.champion_psnr_drop_db,
        packed__velocity_mse=own["packed.velocity_mse"] / (1.1 * GATE.champion_velocity_mse_ratio),
        speedup__over_bf16=1.1 * own["speedup.over_bf16"] / GATE.champion_speedup_ratio,
    )
    against = ["psnr_db against champion", "velocity_mse against champion", "speedup against champion"]
    assert failures(measured(), better) == against
    assert failures(measured(), better, same_machine=False) == against[:2]
    assert failures(better, measured()) == []


def test_what_was_not_measured_passes_nothing() -> None:
    rules = evaluate_gate(GATE, {}, None)
    assert len(rules) == 7 and not any(rule.ok for rule in rules)
    assert "not measured" in str(rules[0]) and rules[0].known is None
    assert failures(measured(), {}) == [], "a champion without numbers sets no limit"


def test_a_value_at_the_limit_passes() -> None:
    assert Rule("x", 1.0, "<=", 1.0, "").ok and Rule("x", 1.0, ">=", 1.0, "").ok
    assert not Rule("x", math.nan, ">=", 0.0, "").ok
