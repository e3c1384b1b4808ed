import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.champion.gate import Rule, evaluate_gate
from qvgen.gate import Limit
from qvgen.params import load_params
from stages.register import MEASURED, leaves

ROOT = Path(__file__).parents[3]
GATE = load_params(ROOT / "params.yaml").gate
DROP, RATIO, SPEED = 0.5, 1.1, 0.85  # of section gate.champion: psnr_db, velocity_mse, speedup
DIGITS = ("colour", "direction", "digit")
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
        packed__psnr_db=own["packed.psnr_db"] + 2 * DROP,
        packed__velocity_mse=own["packed.velocity_mse"] / (1.1 * RATIO),
        speedup__over_bf16=1.1 * own["speedup.over_bf16"] / SPEED,
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


def without_digits(numbers: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if name.rpartition(".")[2] not in DIGITS}


def test_a_metric_that_the_data_does_not_have_is_no_fault_if_evaluate_says_so() -> None:
    own = without_digits(measured())
    assert failures(own) == ["colour drop", "direction drop", "digit drop"], "forgotten, for all the gate knows"
    rules = evaluate_gate(GATE, own, own, not_applicable=DIGITS)
    assert all(rule.ok for rule in rules)
    assert [rule.name for rule in rules if not rule.applies] == ["colour drop", "direction drop", "digit drop"]
    assert "not applicable" in str(rules[0]) and "PASS" not in str(rules[0])
    assert failures(without_digits(measured(packed__psnr_db=1.0)), None, not_applicable=DIGITS) == ["psnr_db"]


def test_what_only_the_champion_was_judged_by_does_not_apply() -> None:
    rules = evaluate_gate(GATE, without_digits(measured()), measured(), not_applicable=DIGITS)
    assert [r.name for r in rules if not r.applies and "champion" in r.name] == [f"{d} against champion" for d in DIGITS]


def test_a_declared_metric_that_is_there_is_judged_all_the_same() -> None:
    assert failures(measured(packed__digit=0.5), None, not_applicable=DIGITS) == ["digit drop"]


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"metric": "x"}, "give either max or min"),
        ({"metric": "x", "max": 1.0, "min": 0.0}, "give either max or min"),
        ({"metric": "x", "minus": "y", "over": "z", "max": 1.0}, "minus or over"),
    ],
)
def test_a_rule_has_one_limit(limit: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Limit.model_validate(limit)
