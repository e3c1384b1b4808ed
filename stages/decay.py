"""Stage decay: continue qat's training while the rank of Φ falls to zero, then without Φ.

Reads artifacts/qat besides what stage qat reads; writes the trained student (artifacts/decay/student.safetensors) and one
row per step in metrics/decay.csv.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.runtime.run import Stage, stage_main
from stages.runtime.training import QAT_STATE, train

if TYPE_CHECKING:
    from qvgen.params import Params
    from qvgen.training.loop import Trainer
    from qvgen.training.recipe import Sources


def run(stage: Stage) -> None:
    from qvgen.training.recipe import Sources

    schedule = stage.params.schedule
    save = partial(save_student, stage.params, Sources.of(stage.root))
    student = Path("artifacts/decay/student.safetensors")
    train(stage, schedule.hold_steps, schedule.total_steps, student, save, QAT_STATE)


def save_student(params: Params, sources: Sources, path: Path | None, trainer: Trainer) -> None:
    """Write what `pack` reads; without a path help the process that does."""
    from qvgen.tensors import save_gathered
    from qvgen.training.recipe import finish

    save_gathered(path, finish(trainer, params, sources).state_dict())


if __name__ == "__main__":
    stage_main("decay", run, shared=True)
