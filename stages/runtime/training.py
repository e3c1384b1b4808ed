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

STATE = "state.safetensors"
COLUMNS: tuple[str, ...] = ("step", "loss", "gradient_norm", "rank", "u", "lr", "seconds")
LAST = 50  # steps averaged into the final loss


def train(stage: Stage, first: int, until: int, start: Path | None = None) -> tuple[Trainer, list[dict[str, float]]]:
    """Train from step `first`, whose state is in the file `start` if it is not the beginning, up to step `until`; or from this
    stage's own checkpoint if there is one. Returns the trainer and one row per step."""
    from qvgen.training.ranks import ranks
    from qvgen.training.recipe import Sources

    checkpoint = stage.checkpoint_dir / STATE
    build = partial(_trainer, stage.params, Sources.of(stage.root), checkpoint if checkpoint.exists() else start)
    with ranks(stage.params.compute.processes, stage.device, partial(_train_along, build, until)) as group:
        trainer = build(group)
        return trainer, _train(stage, trainer, first, until)


def _trainer(params: Params, sources: Sources, state: Path | None, group: Ranks) -> Trainer:
    from qvgen.checkpoint.training import load_training_state
    from qvgen.training.recipe import build_trainer

    trainer = build_trainer(params, sources, resumed=state is not None, ranks=group)
    if state is not None:
        trainer.step = load_training_state(state, trainer.student, trainer.optimizer, trainer.average)
    return trainer


def _train_along(build: Callable[[Ranks], Trainer], until: int, group: Ranks) -> None:
    build(group).run(until)


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
            # Seven digits are all that a float32 has; more would be most of the file.
            row = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in record.as_dict().items()}
            rows.append(row)
            stage.log_metrics({k: v for k, v in row.items() if k != "step"}, step=record.step)
            progress.set_postfix(loss=f"{record.loss:.4f}", rank=record.rank, grad=f"{record.gradient_norm:.3f}")
            progress.update()
            due = time.monotonic() - written >= stage.params.compute.checkpoint_seconds
            if due and trainer.step % stage.params.qat.checkpoint_every == 0 and trainer.step < until:
                with stage.resumable():
                    # First, and whole or not at all: rows beyond the state's step are cut on resume.
                    write_rows(checkpoint.with_suffix(".new"), rows)
                    checkpoint.with_suffix(".new").replace(checkpoint.with_suffix(".csv"))
                    save_state(checkpoint, trainer)
                written = time.monotonic()

        trainer.run(until, on_step)
    return rows


def save_state(path: Path, trainer: Trainer) -> None:
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
