"""lsq: learned step sizes (LSQ, arXiv 1902.08153), trained on the task.

Loss: |student - target|^2, the loss the full-precision model was trained with; the teacher plays no part. The step s of the
weights is learned through the straight-through estimator, with its gradient scaled by 1 / sqrt(n P), n the number of weights
that share s.

Deviations: steps start from the searched grids instead of 2 E|w| / sqrt(P); zero points are fixed where they start (LSQ is
symmetric; the scheme decides that here); activations have a dynamic range per token, so what is learned for them is the
clip of that range, one pair per timestep group, instead of one step per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.methods.method import Method, PhiSettings, Quantize, Teacher

if TYPE_CHECKING:
    import torch
    from torch import nn


class LearnedSteps(Method):
    def prepare_(self, student: nn.Module, quantize_: Quantize, phi: PhiSettings, generator: torch.Generator) -> None:
        from qvgen.nn.swap import freeze_zero_points_

        quantize_(student)
        freeze_zero_points_(student)

    def loss(self, student: torch.Tensor, teacher: Teacher, target: torch.Tensor, cleanness: torch.Tensor) -> torch.Tensor:
        return (student - target).square().mean()


METHOD = LearnedSteps("lsq")
