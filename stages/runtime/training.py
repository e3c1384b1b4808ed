"""What the stages qat and decay share: one run of training, cut in two where rank decay begins.

Both build the same trainer; decay loads qat's last state, so the two together take exactly the steps of one run. Each
resumes from its own checkpoint after a kill.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvgen.params import Params
from stages.runtime.run import Stage

if TYPE_CHECKING:
    from qvgen.training.loop import StepRecord, Trainer

STATE = "state.safetensors"
COLUMNS: tuple[str, ...] = ("step", "loss", "gradient_norm", "rank", "u", "lr", "seconds")
LAST = 50  # steps averaged into the final loss


@dataclass(frozen=True)
class Sources:
    """What training reads: a pipeline folder, the folder of calibrated grids, the folder of prepared data."""

    model: Path
    calibration: Path
    data: Path

    @classmethod
    def of(cls, root: Path, calibration: Path | None = None) -> Sources:
        artifacts = root / "artifacts"
        return cls(artifacts / "model", calibration or artifacts / "calibration", artifacts / "data")


def calibrate(params: Params, sources: Sources) -> None:
    """What stage calibrate leaves for training: grids.safetensors and folds.safetensors."""
    from qvgen.checkpoint.grids import save_folds, save_grids
    from qvgen.checkpoint.pipeline import load_transformer
    from qvgen.data.latents import LatentDataset
    from qvgen.models.registry import load_family
    from qvgen.nn.targets import match_linears
    from qvgen.training.calibration import fold_inputs_, record_inputs, search_grids

    transformer, family = load_transformer(sources.model).float(), load_family(sources.model)
    scheme, method = params.effective_scheme, params.chosen
    names = match_linears(transformer, scheme.targets, scheme.ignore, family.default_targets)
    data = LatentDataset.open(sources.data / "calibration")
    inputs = record_inputs(transformer, family, data, names, scheme.timestep_groups, params.calibrate, params.seed)
    folds = fold_inputs_(transformer, family, inputs) if method.folded else {}
    sources.calibration.mkdir(parents=True, exist_ok=True)
    save_folds(sources.calibration / "folds.safetensors", folds)
    if method.searched:
        grids = search_grids(transformer, inputs, method, scheme, params.calibrate)
        save_grids(sources.calibration / "grids.safetensors", grids)


def build_trainer(params: Params, sources: Sources) -> Trainer:
    """Trainer at step 0: the student as the method starts it, and the full-precision teacher."""
    from qvgen.checkpoint.pipeline import load_transformer
    from qvgen.data.latents import LatentDataset
    from qvgen.models.registry import load_family
    from qvgen.training.loop import LoopSettings, Trainer
    from qvgen.training.optim import OptimizerSettings

    family = load_family(sources.model)
    teacher, student = (load_transformer(sources.model).float() for _ in range(2))
    if params.chosen.quantized:
        prepare_student_(student, params, sources)
    qat = params.qat
    return Trainer(
        student,
        teacher,
        family,
        LatentDataset.open(sources.data / "train"),
        params.schedule,
        LoopSettings(
            seed=params.seed,
            batch_size=qat.batch_size,
            max_grad_norm=qat.max_grad_norm,
            caption_dropout=qat.caption_dropout if params.chosen.caption_dropout is None else params.chosen.caption_dropout,
            ema_decay=qat.ema_decay,
            optimizer=OptimizerSettings(
                learning_rate=qat.learning_rate,
                quantizer_learning_rate=qat.quantizer_learning_rate,
                clip_learning_rate=qat.clip_learning_rate,
                betas=qat.betas,
                weight_decay=qat.weight_decay,
                warmup_fraction=qat.warmup_fraction,
                final_learning_rate=qat.final_learning_rate,
            ),
            redecompose=params.decay.redecompose,
        ),
        params.chosen,
    )


def prepare_student_(student: Any, params: Params, sources: Sources) -> None:
    """Quantizers, folded inputs, Φ and adapters, as the method has them."""
    import torch

    from qvgen.checkpoint.grids import load_folds, load_grids
    from qvgen.models.registry import load_family
    from qvgen.nn.swap import add_adapters_, add_phi_, freeze_zero_points_, prepare_
    from qvgen.training.calibration import apply_folds_

    method, family = params.chosen, load_family(sources.model)
    grids = load_grids(sources.calibration / "grids.safetensors") if method.searched else None
    apply_folds_(student, family, load_folds(sources.calibration / "folds.safetensors"))
    prepare_(student, params.effective_scheme, default_targets=family.default_targets, grids=grids)
    generator = torch.Generator().manual_seed(params.seed)
    if method.phi:
        zero = generator if params.decay.initialization == "zero" else None
        add_phi_(student, params.decay.initial_rank, zero)
    if method.adapter:
        add_adapters_(student, generator)
    if not method.zero_points:
        freeze_zero_points_(student)


def finish(trainer: Trainer, params: Params, sources: Sources) -> Any:
    """The trained student, ready for `convert_`. One that trained in full precision is calibrated and quantized now."""
    student = trainer.finish()
    if params.chosen.quantized:
        return student
    from qvgen.data.latents import LatentDataset
    from qvgen.nn.swap import prepare_
    from qvgen.nn.targets import match_linears
    from qvgen.training.calibration import record_inputs, search_grids

    scheme, family = params.effective_scheme, trainer.family
    names = match_linears(student, scheme.targets, scheme.ignore, family.default_targets)
    data = LatentDataset.open(sources.data / "calibration")
    inputs = record_inputs(student, family, data, names, scheme.timestep_groups, params.calibrate, params.seed)
    grids = search_grids(student, inputs, params.chosen, scheme, params.calibrate)
    prepare_(student, scheme, default_targets=family.default_targets, grids=grids)
    return student


def train(stage: Stage, trainer: Trainer, until: int) -> list[dict[str, float]]:
    """Train up to step `until`, resuming this stage's own checkpoint if there is one. Returns one row per step."""
    from qvgen.checkpoint.training import load_training_state

    first, checkpoint = trainer.step, stage.checkpoint_dir / STATE
    rows: list[dict[str, float]] = []
    if checkpoint.exists():
        trainer.step = load_training_state(checkpoint, trainer.student, trainer.optimizer, trainer.average)
        rows = _read_rows(checkpoint.with_suffix(".csv"))[: trainer.step - first]
        print(f"{stage.name}: continues at step {trainer.step} of {until}")

    with stage.progress(until - first, initial=trainer.step - first) as progress:

        def on_step(trainer: Trainer, record: StepRecord) -> None:
            row = record.as_dict()
            rows.append(row)
            stage.log_metrics({k: v for k, v in row.items() if k != "step"}, step=record.step)
            progress.set_postfix(loss=f"{record.loss:.4f}", rank=record.rank, grad=f"{record.gradient_norm:.3f}")
            progress.update()
            if trainer.step % stage.params.qat.checkpoint_every == 0 and trainer.step < until:
                with stage.resumable():
                    # First, and whole or not at all: rows beyond the state's step are cut on resume.
                    write_rows(checkpoint.with_suffix(".new"), rows)
                    checkpoint.with_suffix(".new").replace(checkpoint.with_suffix(".csv"))
                    save_state(checkpoint, trainer)

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
