"""Choose each trained method's learning rate by its tuning cases. All methods were tried equally.

The rate with the smallest velocity error, among those with which sampled videos are as good as with the best: PSNR within
TIE_DB. By the velocity error alone rates come out that make worse videos; by PSNR alone chance decides between neighbours
(LOG.md). Reads comparison/results/*-lr*.json; writes comparison/learning_rates.json: {"chosen": {method: factor}, "tried":
{method: {factor: {"psnr_db", "velocity_mse"}}}}, measured on prompts and clips of the calibration data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from comparison.cases import RATES, RESULTS, Case
from comparison.store import read_result
from stages.runtime.run import Stage

TIE_DB = 0.4  # seeds of one method at one rate differ by as much (LOG.md)


def choose_rates(stage: Stage, cases: Sequence[Case]) -> None:
    """By the results of `cases`; a method whose cases are not all there is left out."""
    tried: dict[str, dict[float, dict[str, float]]] = {}
    lacking = set[str]()
    for case in cases:
        if result := read_result(stage.root / RESULTS / f"{case.name}.json"):
            scores = result["scores"]
            measured = {name: scores[f"tuning_{name}"] for name in ("psnr_db", "velocity_mse")}
            tried.setdefault(case.method, {})[scores["learning_rate_factor"]] = measured
        else:
            lacking.add(case.method)
    content = {
        "chosen": {method: choose(rates) for method, rates in tried.items() if method not in lacking},
        "tried": {method: {f"{rate:g}": rates[rate] for rate in sorted(rates)} for method, rates in tried.items()},
    }
    with stage.outputs(RATES) as path:
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def choose(rates: Mapping[float, Mapping[str, float]]) -> float:
    """The rate with the smallest velocity_mse of those whose psnr_db is within TIE_DB of the best."""
    best = max(measured["psnr_db"] for measured in rates.values())
    equal = [rate for rate, measured in rates.items() if measured["psnr_db"] >= best - TIE_DB]
    return min(equal, key=lambda rate: rates[rate]["velocity_mse"])
