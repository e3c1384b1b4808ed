"""Optimizer of a quantization-aware run: its parameter groups, its learning-rate curve."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from qvgen.nn.swap import qat_layers
from qvgen.params import Qat

EIGHT_BIT = "torchao>=0.18"


def build_optimizer(model: nn.Module, settings: Qat) -> torch.optim.Optimizer:
    """AdamW over everything that is trainable; each group's full learning rate is its `base_lr`. Raises ValueError for
    adamw8bit where torchao is not installed.

    Four groups: matrices and Φ (decayed), vectors such as biases and norms, weight quantizers, clips. Only the first is
    decayed; the public code decays scales, zero points and clips as well, which pulls them to zero.
    """
    quantizers, clips = [], []
    for _, layer in qat_layers(model):
        quantizers += list(layer.weight_quantizer.parameters())
        if layer.input_quantizer is not None:
            clips += list(layer.input_quantizer.parameters())
    special = {id(p) for p in (*quantizers, *clips)}
    others = [p for p in model.parameters() if id(p) not in special]
    groups = [
        ("weights", [p for p in others if p.ndim >= 2], settings.learning_rate, settings.weight_decay),
        ("vectors", [p for p in others if p.ndim < 2], settings.learning_rate, 0.0),
        ("quantizers", quantizers, settings.quantizer_learning_rate, 0.0),
        ("clips", clips, settings.clip_learning_rate, 0.0),
    ]
    trainable = [
        {"name": name, "params": trained, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for name, parameters, rate, decay in groups
        if (trained := [p for p in parameters if p.requires_grad])
    ]
    if settings.optimizer == "adamw8bit":
        optimizer = _adamw8bit()(trainable, betas=settings.betas)
        _keep_whole_ranges(optimizer, clips)
        return optimizer
    # One pass over a parameter and its moments, without temporaries, where PyTorch has that.
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(trainable, betas=settings.betas, fused=fused)


def _adamw8bit() -> Any:
    """torchao's AdamW of the same rule, whose moments of 4,096 and more numbers are 8-bit codes (Dettmers et al. 2021). Its
    step is compiled for each shape, once."""
    try:
        from torchao.optim import AdamW8bit  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(
            f"qat.optimizer: adamw8bit needs torchao ({error}): pip install '{EIGHT_BIT}', or set qat.optimizer: adamw"
        ) from None
    return AdamW8bit


def _keep_whole_ranges(optimizer: torch.optim.Optimizer, clips: list[nn.Parameter]) -> None:
    """The logit of a clip of 1 is infinite and does not learn. torchao subtracts a decay of 0 x infinity from it: NaN."""
    whole = [(p, p.detach().isinf(), p.detach().clone()) for p in clips if p.isinf().any()]

    @torch.no_grad()
    def put_back(*_: object) -> None:
        for parameter, infinite, start in whole:
            parameter.copy_(torch.where(infinite, start, parameter))

    optimizer.register_step_post_hook(put_back)


def learning_rate_factor(step: int, total_steps: int, settings: Qat) -> float:
    """Linear warm-up, then a cosine from 1 to `final_learning_rate` over the whole run (all stages together)."""
    warmup = round(settings.warmup_fraction * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    floor = settings.final_learning_rate
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        rate = group["base_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):  # which compiled steps read
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
