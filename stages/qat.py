"""Stage qat: quantization-aware training against the teacher, with Φ at full rank.

Reads artifacts/model, artifacts/calibration, artifacts/data/train; writes the training state that stage decay continues
(artifacts/qat) and one row per step in metrics/qat.csv.
"""

from __future__ import annotations

from stages.runtime.run import Stage, stage_main
from stages.runtime.training import STATE, save_state, train, write_metrics


def run(stage: Stage) -> None:
    trainer, rows = train(stage, 0, stage.params.schedule.hold_steps)
    with stage.outputs("artifacts/qat") as folder:
        save_state(folder / STATE, trainer)
    write_metrics(stage, rows)


if __name__ == "__main__":
    stage_main("qat", run)
