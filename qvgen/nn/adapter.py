"""Low-rank adapters inside the weight quantizer, Q(W + s B A): trained instead of the weight, merged at the end."""

from __future__ import annotations

import torch
from torch import nn

RANK_DIVISOR = 16  # rank = min(N, K) / 16, the same share of a layer whatever its width


class LowRankAdapter(nn.Module):
    """`up` (N, R), zero at the start, `down` (R, K), random, and the step of each channel, (N, 1).

    Source: EfficientDM (arXiv 2310.03270), with the deviations that qvgen/methods/efficientdm.py names.
    """

    step: torch.Tensor

    def __init__(self, step: torch.Tensor, in_features: int, generator: torch.Generator) -> None:
        super().__init__()
        rank = max(1, min(len(step), in_features) // RANK_DIVISOR)
        self.up = nn.Parameter(torch.zeros(len(step), rank, device=step.device))
        down = torch.randn(rank, in_features, generator=generator) / in_features**0.5  # the same on every device
        self.down = nn.Parameter(down.to(step.device))
        self.register_buffer("step", step.detach().clone(), persistent=False)

    def delta(self) -> torch.Tensor:
        """s B A, (N, K)."""
        return self.step * (self.up @ self.down)
