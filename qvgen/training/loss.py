"""What the student is trained towards. One function per objective; a method names the one it uses.

All take predictions (n, ...) of the student and the teacher, the training target (what the model itself was trained to
predict: noise - clean for flow matching, v for CogVideoX), and `cleanness` (n,) in [0, 1]: 0 pure noise, 1 clean data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

DSA_ALPHA = 3.0  # how fast supervision passes from the teacher to the data; DSAQuant's own value is not published

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def teacher_loss(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, cleanness: torch.Tensor) -> torch.Tensor:
    """Mean squared difference between student and teacher (QVGen, section 3.1; Q-DM's noise-estimating mimicking)."""
    return (student - teacher).square().mean()


def target_loss(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, cleanness: torch.Tensor) -> torch.Tensor:
    """The task's own loss: what the full-precision model was trained with. The teacher plays no part."""
    return (student - target).square().mean()


def dual_loss(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, cleanness: torch.Tensor, *, alpha: float
) -> torch.Tensor:
    """λ(t) |student - teacher|^2 + (1 - λ(t)) |student - target|^2, per sample, then the mean (DSAQuant).

    The teacher rules at pure noise, where the target says least about the picture, and the data near the end.
    """
    share = teacher_share(cleanness, alpha)
    to_teacher = (student - teacher).square().flatten(1).mean(1)
    to_target = (student - target).square().flatten(1).mean(1)
    return (share * to_teacher + (1 - share) * to_target).mean()


def teacher_share(cleanness: torch.Tensor, alpha: float) -> torch.Tensor:
    """λ(t) = (e^{α (1 - t)} - 1) / (e^α - 1): 1 at t = 0 (pure noise), 0 at t = 1 (clean data)."""
    return torch.expm1(alpha * (1 - cleanness)) / math.expm1(alpha)


LOSSES: dict[str, Loss] = {
    "teacher": teacher_loss,
    "target": target_loss,
    "dual": partial(dual_loss, alpha=DSA_ALPHA),
}
