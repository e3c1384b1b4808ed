"""Stage qat: quantization-aware training against the teacher, with Φ at full rank.

Reads artifacts/model, artifacts/calibration, artifacts/data/train; writes the training state that stage decay continues
(artifacts/qat) and one row per step in metrics/qat.csv.
"""

from __future__ import annotations

from stages.runtime.run import Stage, stage_main
from stages.runtime.training import QAT_STATE, save_state, train


def run(stage: Stage) -> None:
    train(stage, 0, stage.params.schedule.hold_steps, QAT_STATE, save_state)


if __name__ == "__main__":
    stage_main("qat", run, shared=True)
