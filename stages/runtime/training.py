"""Files of the stages qat and decay, which are one run of training, cut in two where rank decay begins.

Both build the same trainer (qvgen/training/recipe.py); decay loads qat's last state, so the two together take exactly the
steps of one run. Each resumes from its own checkpoint after a kill.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.runtime.run import Stage

if TYPE_CHECKING:
    from qvgen.params import Params
    from qvgen.training.loop import StepRecord, Trainer
    from qvgen.training.ranks import Ranks
    from qvgen.training.recipe import Sources

    Save = Callable[[Path | None, Trainer], None]

STATE = "state.safetensors"
QAT_STATE = Path("artifacts/qat") / STATE
COLUMNS: tuple[str, ...] = ("step", "loss", "gradient_norm", "rank", "u", "lr", "seconds")
LAST = 50  # steps averaged into the final loss


def train(stage: Stage, first: int, until: int, output: Path, save: Save, start: Path | None = None) -> None:
    """Train from step `first`, whose state is in the project's file `start` if it is not the beginning, up to step `until`,
    or from this stage's own checkpoint if there is one. Then the first process writes metrics, and with `save(path, trainer)`
    the project's file `output`. Of a sharded model all processes call that, the others with None for the path."""
    from qvgen.training.ranks import ranks
    from qvgen.training.recipe import Sources

    checkpoint = stage.checkpoint_dir / STATE
    build = partial(_trainer, stage.params, Sources.of(stage.root), checkpoint, start and stage.root / start)
    train_along = partial(_train_along, build, until, save)

    def write() -> None:
        with stage.outputs(output.parent) as folder:
            save(folder / output.name, trainer)

    with ranks(stage.params.compute.processes, stage.device, train_along) as group:
        if group.rank:  # of a group that it has joined
            train_along(group)
            return
        trainer = build(group)
        rows = _train(stage, trainer, first, until)
        if trainer.sharded:
            write()
    if not trainer.sharded:  # with all threads
        write()
    write_metrics(stage, rows)


def _trainer(params: Params, sources: Sources, checkpoint: Path, start: Path | None, group: Ranks) -> Trainer:
    from qvgen.checkpoint.training import load_training_state
    from qvgen.training.recipe import build_trainer

    state = checkpoint if group.first_says(checkpoint.exists()) else start
    trainer = build_trainer(params, sources, resumed=state is not None, ranks=group)
    if state is not None:
        trainer.step = load_training_state(state, trainer.student, trainer.optimizer, trainer.average)
    return trainer


def _train_along(build: Callable[[Ranks], Trainer], until: int, save: Save, group: Ranks) -> None:
    trainer = build(group)
    if not trainer.sharded:
        trainer.run(until)
        return

    def on_step(trainer: Trainer, record: StepRecord) -> None:
        if _may_checkpoint(trainer, until) and group.first_says(False):
            save_state(None, trainer)

    trainer.run(until, on_step)
    save(None, trainer)


def _may_checkpoint(trainer: Trainer, until: int) -> bool:
    return trainer.step % trainer.params.qat.checkpoint_every == 0 and trainer.step < until


def _train(stage: Stage, trainer: Trainer, first: int, until: int) -> list[dict[str, float]]:
    checkpoint = stage.checkpoint_dir / STATE
    rows: list[dict[str, float]] = []
    written = time.monotonic()  # the last checkpoint
    if checkpoint.exists():
        rows = _read_rows(checkpoint.with_suffix(".csv"))[: trainer.step - first]
        print(f"{stage.name}: continues at step {trainer.step} of {until}")

    with stage.progress(until - first, initial=trainer.step - first) as progress:

        def on_step(trainer: Trainer, record: StepRecord) -> None:
            nonlocal written
            # Digits enough to draw; more would be most of the file.
            row = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in record.as_dict().items()}
            rows.append(row)
            stage.log_metrics({k: v for k, v in row.items() if k != "step"}, step=record.step)
            progress.set_postfix(loss=f"{record.loss:.4f}", rank=record.rank, grad=f"{record.gradient_norm:.3f}")
            progress.update()
            due = time.monotonic() - written >= stage.params.compute.checkpoint_seconds
            if _may_checkpoint(trainer, until) and (trainer.ranks.first_says(due) if trainer.sharded else due):
                with stage.resumable():
                    path = None  # if rows cannot be written: the others wait to be asked for their parts all the same
                    try:
                        # First, and whole or not at all: rows beyond the state's step are cut on resume.
                        write_rows(checkpoint.with_suffix(".new"), rows)
                        path = checkpoint.with_suffix(".new").replace(checkpoint.with_suffix(".csv")).with_name(STATE)
                    finally:
                        save_state(path, trainer)
                written = time.monotonic()

        trainer.run(until, on_step)
    return rows


def save_state(path: Path | None, trainer: Trainer) -> None:
    """Write a training state; without a path help the process that does, if the model is sharded."""
    from qvgen.checkpoint.training import save_training_state

    save_training_state(path, trainer.student, trainer.optimizer, trainer.average, trainer.step)


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_metrics(stage: Stage, rows: list[dict[str, float]]) -> None:
    """metrics/<stage>.json and .csv. The final loss is a mean over the last steps, null for a run without steps."""
    last = rows[-LAST:]
    summary = {
        "steps": len(rows),
        "final_loss": sum(r["loss"] for r in last) / len(last) if last else None,
        "mean_gradient_norm": sum(r["gradient_norm"] for r in rows) / len(rows) if rows else None,
        "train_seconds": sum(r["seconds"] for r in rows),
    }
    with stage.outputs(f"metrics/{stage.name}.csv") as path:
        write_rows(path, rows)
    with stage.outputs(f"metrics/{stage.name}.json") as path:
        path.write_text(json.dumps(summary, indent=2) + "\n")
    stage.log_metrics({k: v for k, v in summary.items() if v is not None})
    stage.log_artifact(f"metrics/{stage.name}.csv")


def _read_rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{k: int(v) if v.isdigit() else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
