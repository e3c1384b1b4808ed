"""Quantizers as modules: learned scale and zero point of weights (LSQ+), learned clips of activations.

The parameters are what the packed model stores: nothing here has to be estimated again at export.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from qvgen.quant.primitives import codes, dequantize, fake_quantize, range_to_grid, round_ste, token_grid
from qvgen.quant.scheme import QuantArgs


class WeightQuantizer(nn.Module):
    """Fake-quantizes a weight (N, K) with `scale` and `zero_point` (rows, G): rows is N, or 1 for strategy tensor; G is
    the number of groups along K, 1 unless the strategy is group. Symmetric quantizers have no `zero_point` parameter.

    Source: LSQ+ (arXiv 2004.09576). Gradients of both are scaled by 1/sqrt(n P), n the number of elements that share a scale:
    K for strategy channel, as in QVGen's code; N K for tensor; group_size for group.
    """

    def __init__(self, args: QuantArgs, scale: torch.Tensor, zero_point: torch.Tensor | None) -> None:
        super().__init__()
        self.args = args
        self.scale = nn.Parameter(scale.detach().clone().float())
        if args.symmetric:
            self.register_parameter("zero_point", None)
        else:
            if zero_point is None:
                raise ValueError("an asymmetric quantizer needs a zero point")
            self.zero_point = nn.Parameter(zero_point.detach().clone().float())

    @classmethod
    def min_max(cls, args: QuantArgs, weight: torch.Tensor) -> WeightQuantizer:
        """The grid that covers each channel's (group's, tensor's) whole range."""
        lower, upper = weight_range(weight, args)
        return cls(args, *range_to_grid(lower, upper, args))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight on its grid, differentiable in the weight, the scale and the zero point."""
        grouped = grouped_weight(weight, self.args)
        factor = 1 / math.sqrt(grouped.shape[-1] * self.args.max_code)
        scale = _ScaleGradient.apply(self.scale, factor)
        zero_point = None if self.zero_point is None else _ScaleGradient.apply(self.zero_point, factor)
        return fake_quantize(grouped, *self._grid(scale, zero_point), self.args).view_as(weight)

    @torch.no_grad()
    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Codes (N, K) uint8."""
        grid = self._grid(self.scale, self.zero_point)
        return codes(grouped_weight(weight.float(), self.args), *grid, self.args).view_as(weight).to(torch.uint8)

    @torch.no_grad()
    def dequantized(self, weight: torch.Tensor) -> torch.Tensor:
        """What the packed model's weight will be, (N, K) float32."""
        grid = self._grid(self.scale, self.zero_point)
        grouped = grouped_weight(weight.float(), self.args)
        return dequantize(codes(grouped, *grid, self.args), *grid).view_as(weight)

    def export(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point (rows, G) float32 as the packed model stores them; None when symmetric."""
        scale, zero_point = self._grid(self.scale.detach(), self.zero_point)
        exported = None if self.zero_point is None else zero_point.detach().squeeze(-1)
        return scale.squeeze(-1), exported

    def _grid(self, scale: torch.Tensor, zero_point: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point (rows, G, 1) as used: the scale kept positive, an integer zero point rounded."""
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        if zero_point is None:
            zero_point = torch.full_like(scale, self.args.symmetric_zero_point)
        elif self.args.zero_point_domain == "integer":
            zero_point = round_ste(zero_point).clamp(0, self.args.max_code)
        return scale.unsqueeze(-1), zero_point.unsqueeze(-1)


class ActivationQuantizer(nn.Module):
    """Fake-quantizes activations (n, ..., K) per token at run time; `clip_lower`, `clip_upper` (groups,) shrink the
    token's range, one pair per timestep group.

    The clips are kept as logits, so that training cannot leave (0, 1). Source: QVGen, section 4.1.
    """

    def __init__(self, args: QuantArgs, clip_lower: torch.Tensor, clip_upper: torch.Tensor) -> None:
        super().__init__()
        self.args = args
        self.clip_lower_logit = nn.Parameter(torch.logit(clip_lower.detach().float()))
        self.clip_upper_logit = nn.Parameter(torch.logit(clip_upper.detach().float()))

    def forward(self, x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """`group` (n,) or (1,) int64 is the timestep group of each sample."""
        shape = (-1, *[1] * (x.ndim - 1))
        lower = torch.sigmoid(self.clip_lower_logit)[group].view(shape)
        upper = torch.sigmoid(self.clip_upper_logit)[group].view(shape)
        return fake_quantize(x, *token_grid(x, lower, upper, self.args), self.args)

    def export(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips (groups,) float32 in (0, 1) as the packed model stores them."""
        return torch.sigmoid(self.clip_lower_logit.detach()), torch.sigmoid(self.clip_upper_logit.detach())


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor, None


def grouped_weight(weight: torch.Tensor, args: QuantArgs) -> torch.Tensor:
    """View of a weight (N, K) as (N, G, K/G), or (1, 1, N K) for strategy tensor: one grid per last dimension."""
    n, k = weight.shape
    if args.strategy == "tensor":
        return weight.reshape(1, 1, n * k)
    size = args.group_size or k
    if k % size:
        raise ValueError(f"in_features {k} is not a multiple of group_size {size}; choose a divisor or strategy 'channel'")
    return weight.reshape(n, k // size, size)


def weight_range(weight: torch.Tensor, args: QuantArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum (rows, G) of each channel, group or of the tensor."""
    return torch.aminmax(grouped_weight(weight.detach().float(), args), dim=-1)
