"""The recipe of a quantized model: `calibrate`, `build_trainer`, `trainer.run(...)`, `finish`; then `convert_` packs it.

The stages calibrate, qat and decay are this recipe cut in three, and a case of the comparison runs it in one process. What
differs from method to method is in the hooks of its card (qvgen/methods/method.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qvgen.checkpoint.grids import load_folds, load_grids, save_folds, save_grids
from qvgen.checkpoint.pipeline import load_transformer
from qvgen.data.latents import LatentDataset
from qvgen.device import resolve_device
from qvgen.models.family import Family
from qvgen.models.registry import load_family
from qvgen.nn.swap import prepare_
from qvgen.params import Params
from qvgen.training.calibration import Calibration, apply_folds_, calibrate_
from qvgen.training.loop import Trainer
from qvgen.training.ranks import Ranks
from qvgen.training.sharding import shard_, start_phi_


@dataclass(frozen=True)
class Sources:
    """The folders that training reads: a diffusers pipeline, calibrated grids, prepared data."""

    model: Path
    calibration: Path
    data: Path

    @classmethod
    def of(cls, root: Path, calibration: Path | None = None) -> Sources:
        """The folders of a project, with another folder of grids if one is given."""
        artifacts = root / "artifacts"
        return cls(artifacts / "model", calibration or artifacts / "calibration", artifacts / "data")


def calibrate(params: Params, sources: Sources) -> None:
    """Calibrate the full-precision model and write folds and grids, from which training starts."""
    transformer, family = _load(sources, resolve_device(params.compute.device))
    save_calibration(sources.calibration, calibrate_(transformer, family, _clips(sources), params))


def save_calibration(folder: Path, calibration: Calibration) -> None:
    """Write folds.safetensors and grids.safetensors, and mse.safetensors where the plain grids are others."""
    folder.mkdir(parents=True, exist_ok=True)
    save_folds(folder / "folds.safetensors", calibration.folds)
    save_grids(folder / "grids.safetensors", calibration.grids)
    if calibration.plain is not None:
        save_grids(folder / "mse.safetensors", calibration.plain)


def build_trainer(params: Params, sources: Sources, resumed: bool = False, ranks: Ranks | None = None) -> Trainer:
    """Trainer at step 0: the student as the method starts it, and the full-precision teacher.

    `resumed`: a training state will be loaded into it, so that what costs time and is then overwritten is left out. `ranks`:
    the processes that share its batches, and with compute.shard the models.
    """
    # In mixed precision the teacher is loaded in the dtype that it computes in: half the memory.
    dtype = torch.bfloat16 if params.qat.precision == "bfloat16" else torch.float32
    device = ranks.device if ranks else resolve_device(params.compute.device)
    among = ranks if ranks and ranks.size > 1 and params.compute.shard else None  # that share a model
    at = torch.device("cpu") if among else device
    teacher, family = _load(sources, at, dtype)
    if among:
        shard_(teacher.requires_grad_(False), among)
    student, _ = _load(sources, at)

    def quantize_(model: nn.Module) -> None:
        apply_folds_(model, family, load_folds(sources.calibration / "folds.safetensors"))
        grids = load_grids(sources.calibration / "grids.safetensors")
        prepare_(model, params.effective_scheme, default_targets=family.default_targets, grids=grids)

    start = params.decay.model_copy(update={"initialization": "zero"}) if resumed or among else params.decay  # of Φ
    params.chosen.prepare_(student, quantize_, start, torch.Generator().manual_seed(params.seed))
    if among:
        shard_(student, among)
        if not resumed and params.decay.initialization == "weight_error":
            start_phi_(student, among.copy_from_first_)
    return Trainer(student, teacher, family, LatentDataset.open(sources.data / "train"), params, ranks)


def finish(trainer: Trainer, params: Params, sources: Sources) -> nn.Module:
    """The trained student, ready for `convert_`. Raises ValueError before the last step of rank decay."""
    family, student = trainer.family, trainer.finish()

    def quantize_(model: nn.Module) -> None:
        grids = calibrate_(model, family, _clips(sources), params).grids
        prepare_(model, params.effective_scheme, default_targets=family.default_targets, grids=grids)

    params.chosen.finish_(student, quantize_)
    return student


def _load(sources: Sources, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Family]:
    family = load_family(sources.model)
    return load_transformer(sources.model, dtype, device, family.component), family


def _clips(sources: Sources) -> LatentDataset:
    return LatentDataset.open(sources.data / "calibration")
