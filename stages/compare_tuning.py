"""Stage compare_tuning: choose each trained method's learning rate by its tuning cases. All methods were tried equally.

By the PSNR of sampled videos, not by the error of single predictions: the latter is smallest at larger rates, with which
videos are worse (LOG.md). Reads comparison/results/*-lr*; writes comparison/learning_rates.json: {"chosen": {method:
factor}, "tried": {method: {factor: PSNR in dB on prompts of the calibration clips}}}.
"""

from __future__ import annotations

import json

from stages._comparison import RATES, RESULTS
from stages._run import Stage, stage_main


def run(stage: Stage) -> None:
    tried: dict[str, dict[float, float]] = {}
    for path in sorted((stage.root / RESULTS).glob("*-lr*/scores.json")):
        scores = json.loads(path.read_text())
        tried.setdefault(scores["method"], {})[scores["learning_rate_factor"]] = scores["tuning_psnr_db"]
    chosen = {method: max(psnr, key=lambda factor: psnr[factor]) for method, psnr in tried.items()}
    content = {
        "chosen": chosen,
        "tried": {m: {f"{factor:g}": psnr_db for factor, psnr_db in sorted(psnr.items())} for m, psnr in tried.items()},
    }
    with stage.outputs(RATES) as path:
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    stage_main("compare_tuning", run)
