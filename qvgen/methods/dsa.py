"""dsa: dual supervision and gated guidance (DSAQuant, arXiv 2609.04031).

Loss: λ(t) |student - teacher|^2 + (1 - λ(t)) |student - target|^2 with λ(t) = (e^{α (1 - t)} - 1) / (e^α - 1), t = 0 at pure
noise and 1 at clean data. Sampling goes without guidance from t = τ on, which also saves the second evaluation there.

Deviations: α = 3 and τ = 0.8 are ours. Its lookup table for timestep-conditioned layers is not part of this method: in Wan
those layers (time embedding and its projection) lie outside the blocks and are not quantized here in any method.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qvgen.methods.method import Method, Teacher

if TYPE_CHECKING:
    import torch

ALPHA = 3.0  # how fast supervision passes from the teacher to the data; DSAQuant's own value is not published


class DualSupervision(Method):
    def loss(self, student: torch.Tensor, teacher: Teacher, target: torch.Tensor, cleanness: torch.Tensor) -> torch.Tensor:
        """The sum above per sample, then the mean. The teacher rules at pure noise, where the target says least about the
        picture, and the data near the end."""
        share = teacher_share(cleanness, ALPHA)
        to_teacher = (student - teacher()).square().flatten(1).mean(1)
        to_target = (student - target).square().flatten(1).mean(1)
        return (share * to_teacher + (1 - share) * to_target).mean()


def teacher_share(cleanness: torch.Tensor, alpha: float) -> torch.Tensor:
    """λ(t) (n,): 1 at t = 0 (pure noise), 0 at t = 1 (clean data)."""
    return (alpha * (1 - cleanness)).expm1() / math.expm1(alpha)


METHOD = DualSupervision("dsa", guidance_stop=0.8)
