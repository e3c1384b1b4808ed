"""Training: from a full-precision pipeline folder and prepared data to a student that `convert_` packs.

    params, sources = load_params("params.yaml"), Sources.of(Path("."))
    calibrate(params, sources)                          # folds and grids, into artifacts/calibration
    trainer = build_trainer(params, sources)            # student and teacher, at step 0
    trainer.run(params.schedule.total_steps)
    student = finish(trainer, params, sources)
    convert_(student)

What a method does in these steps is on its card (qvgen/methods). Names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.lazy import lazy

if TYPE_CHECKING:
    from qvgen.training.loop import StepRecord, Trainer
    from qvgen.training.recipe import Sources, build_trainer, calibrate, finish
    from qvgen.training.sampled import calibrate_while

__all__ = ["Sources", "StepRecord", "Trainer", "build_trainer", "calibrate", "calibrate_while", "finish"]

__getattr__ = lazy(
    {
        **dict.fromkeys(("StepRecord", "Trainer"), "qvgen.training.loop"),
        **dict.fromkeys(("Sources", "build_trainer", "calibrate", "finish"), "qvgen.training.recipe"),
        "calibrate_while": "qvgen.training.sampled",
    }
)
