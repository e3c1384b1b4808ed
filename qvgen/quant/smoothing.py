"""Smoothing: outlier channels of a layer's input are divided down, and its weight's columns multiplied up in return.

(X diag(s)^-1)(W diag(s))^T = X W^T for any positive s; what is quantized is X diag(s)^-1 and W diag(s), both in their rotated
form where the scheme rotates. Source: SmoothQuant (arXiv 2211.10438), equation 4.
"""

from __future__ import annotations

import torch

from qvgen.quant.rotation import rotate

# A channel that is dead in X or W has no ratio; and no scale may make the other side overflow in 16 bits.
_SMALLEST, _RANGE = 1e-5, 1e4


def smoothing_scale(input_max: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """s (K,) = max|X_k|^alpha / max|W_k|^(1 - alpha), float32 and positive; input_max is max|X_k| (K,), weight (N, K).

    1 where a channel is zero in all inputs or in the weight.
    """
    input_max, weight_max = input_max.float(), weight.detach().float().abs().amax(0)
    scale = input_max.clamp(min=_SMALLEST) ** alpha / weight_max.clamp(min=_SMALLEST) ** (1 - alpha)
    dead = (input_max < _SMALLEST) | (weight_max < _SMALLEST)
    return torch.where(dead, torch.ones_like(scale), scale.clamp(1 / _RANGE, _RANGE))


def transform_input(x: torch.Tensor, scale: torch.Tensor | None, rotation: int | None) -> torch.Tensor:
    """x (..., K) float32 in the form that is quantized: divided by `scale` (K,), then rotated in blocks of `rotation`."""
    if scale is not None:
        x = x / scale
    return x if rotation is None else rotate(x, rotation)


def transform_weight(weight: torch.Tensor, scale: torch.Tensor | None, rotation: int | None) -> torch.Tensor:
    """The weight (N, K) that makes the same outputs of transformed inputs: multiplied by `scale`, then rotated."""
    if scale is not None:
        weight = weight * scale
    return weight if rotation is None else rotate(weight, rotation)
