"""Stage decay: continue qat's training while the rank of Φ falls to zero, then without Φ.

Reads artifacts/qat besides what stage qat reads; writes the trained student (artifacts/decay/student.safetensors) and one
row per step in metrics/decay.csv.
"""

from __future__ import annotations

from stages.runtime.run import Stage, stage_main
from stages.runtime.training import STATE, train, write_metrics


def run(stage: Stage) -> None:
    from qvgen.tensors import save_tensors
    from qvgen.training.recipe import Sources, finish

    schedule = stage.params.schedule
    start = stage.root / "artifacts/qat" / STATE
    trainer, rows = train(stage, schedule.hold_steps, schedule.total_steps, start)
    student = finish(trainer, stage.params, Sources.of(stage.root))
    with stage.outputs("artifacts/decay") as folder:
        save_tensors(folder / "student.safetensors", student.state_dict())
    write_metrics(stage, rows)


if __name__ == "__main__":
    stage_main("decay", run)
