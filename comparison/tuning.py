"""Stage compare_tuning: choose each trained method's learning rate by its tuning cases. All methods were tried equally.

The rate with the smallest velocity error, among those with which sampled videos are as good as with the best: PSNR within
TIE_DB. By the velocity error alone rates come out that make worse videos; by PSNR alone chance decides between neighbours
(LOG.md). Reads comparison/results/*-lr*; writes comparison/learning_rates.json: {"chosen": {method: factor}, "tried":
{method: {factor: {"psnr_db", "velocity_mse"}}}}, measured on prompts and clips of the calibration data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from comparison.cases import RATES, RESULTS
from stages.runtime.run import Stage, stage_main

TIE_DB = 0.4  # seeds of one method at one rate differ by as much (LOG.md)


def run(stage: Stage) -> None:
    tried: dict[str, dict[float, dict[str, float]]] = {}
    for path in sorted((stage.root / RESULTS).glob("*-lr*/scores.json")):
        scores = json.loads(path.read_text())
        measured = {name: scores[f"tuning_{name}"] for name in ("psnr_db", "velocity_mse")}
        tried.setdefault(scores["method"], {})[scores["learning_rate_factor"]] = measured
    content = {
        "chosen": {method: choose(rates) for method, rates in tried.items()},
        "tried": {method: {f"{rate:g}": rates[rate] for rate in sorted(rates)} for method, rates in tried.items()},
    }
    with stage.outputs(RATES) as path:
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def choose(rates: Mapping[float, Mapping[str, float]]) -> float:
    """The rate with the smallest velocity_mse of those whose psnr_db is within TIE_DB of the best."""
    best = max(measured["psnr_db"] for measured in rates.values())
    equal = [rate for rate, measured in rates.items() if measured["psnr_db"] >= best - TIE_DB]
    return min(equal, key=lambda rate: rates[rate]["velocity_mse"])


if __name__ == "__main__":
    stage_main("compare_tuning", run)
