"""Optimizers of a quantization-aware run: their parameter groups, their learning-rate curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from qvgen.nn.swap import qat_layers

OptimizerKind = Literal["adamw", "muon"]


@dataclass(frozen=True)
class OptimizerSettings:
    learning_rate: float  # weights and Φ
    quantizer_learning_rate: float  # scales, zero points
    clip_learning_rate: float  # logits of activation clips
    betas: tuple[float, float]
    weight_decay: float  # weights and Φ only
    warmup_fraction: float
    final_learning_rate: float  # last over first


def build_optimizers(
    model: nn.Module, settings: OptimizerSettings, kind: OptimizerKind = "adamw"
) -> list[torch.optim.Optimizer]:
    """Optimizers of everything that is trainable; each group's full learning rate is its `base_lr`.

    "adamw": AdamW with four groups: matrices and Φ (decayed), vectors such as biases and norms, weight quantizers, clips.
    Only the first is decayed; the public code decays scales, zero points and clips as well, which pulls them to zero.
    "muon": the same, but the weights of quantized layers are stepped by Muon (torch.optim.Muon): momentum, made orthogonal,
    with steps as large in root mean square as AdamW's, so that one learning rate serves both.
    """
    quantizers, clips, weights = [], [], []
    for _, layer in qat_layers(model):
        quantizers += list(layer.weight_quantizer.parameters())
        weights.append(layer.weight)
        if layer.input_quantizer is not None:
            clips += list(layer.input_quantizer.parameters())
    special = {id(p) for p in (*quantizers, *clips)}
    orthogonal = [p for p in weights if p.requires_grad] if kind == "muon" else []
    special |= {id(p) for p in orthogonal}
    others = [p for p in model.parameters() if id(p) not in special]
    groups = [
        ("weights", [p for p in others if p.ndim >= 2], settings.learning_rate, settings.weight_decay),
        ("vectors", [p for p in others if p.ndim < 2], settings.learning_rate, 0.0),
        ("quantizers", quantizers, settings.quantizer_learning_rate, 0.0),
        ("clips", clips, settings.clip_learning_rate, 0.0),
    ]
    adamw = torch.optim.AdamW(
        [
            {"name": name, "params": trained, "lr": rate, "base_lr": rate, "weight_decay": decay}
            for name, parameters, rate, decay in groups
            if (trained := [p for p in parameters if p.requires_grad])
        ],
        betas=settings.betas,
        foreach=True,
    )
    if not orthogonal:
        return [adamw]
    rate = settings.learning_rate
    group = {"name": "orthogonal", "params": orthogonal, "lr": rate, "base_lr": rate}
    return [adamw, torch.optim.Muon([group], weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")]


def learning_rate_factor(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Linear warm-up, then a cosine from 1 to `final_learning_rate` over the whole run (all stages together)."""
    warmup = round(settings.warmup_fraction * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    floor = settings.final_learning_rate
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
