"""Extras that some methods add to a quantized layer at inference: scaled and rotated inputs, and a low-rank branch in 16
bits.

    x' = rotate(x / input_scale)         float32
    y  = Q(W') Q(x') + up (down x') + b  W' = rotate(W diag(input_scale)) - up down

The branch reads x' unquantized, after the rotation: one transformed input serves both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qvgen.quant.grid import LayerGrid
from qvgen.quant.primitives import without_autocast
from qvgen.quant.scheme import QuantScheme
from qvgen.quant.smoothing import transform_input


def low_rank_output(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """up (down x) for x (..., K), in the dtype of the factors."""
    return F.linear(F.linear(x.to(down.dtype), down), up)


def write_output(y: torch.Tensor, out: torch.Tensor, gelu: bool) -> None:
    """Write y, after a GELU in its tanh form if asked for, to `out`. Raises ValueError if the shapes differ."""
    if out.shape != y.shape:
        raise ValueError(f"out must be of shape {tuple(y.shape)}, not {tuple(out.shape)}")
    out.copy_(F.gelu(y, approximate="tanh") if gelu else y)


class InputTransform(nn.Module):
    """A layer's scaling and rotation, fixed, and its branch, trained with the weight, as QATLinear has them."""

    input_scale: torch.Tensor | None
    low_rank_up: nn.Parameter | None
    low_rank_down: nn.Parameter | None

    def __init__(self, grid: LayerGrid, scheme: QuantScheme) -> None:
        super().__init__()
        self.rotation = scheme.input_rotation
        self.register_buffer("input_scale", None if grid.input_scale is None else grid.input_scale.detach().clone().float())
        for name in ("low_rank_up", "low_rank_down"):
            factor = getattr(grid, name)
            self.register_parameter(name, None if factor is None else nn.Parameter(factor.detach().clone().float()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, ..., K) as the layer's quantizer gets it, float32 under autocast too: so the packed layer computes it."""
        with without_autocast(x.device.type):
            return transform_input(x.float(), self.input_scale, self.rotation)

    def add_branch(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y (n, ..., N) plus the branch's output; x is what `forward` returned."""
        if self.low_rank_up is None or self.low_rank_down is None:
            return y
        return y + low_rank_output(x, self.low_rank_up, self.low_rank_down)

    def export(self) -> dict[str, torch.Tensor | None]:
        """input_scale (K,), low_rank_up (N, R) and low_rank_down (R, K) for the packed layer; None: it has none."""
        return {"input_scale": self.input_scale, "low_rank_up": self.low_rank_up, "low_rank_down": self.low_rank_down}
