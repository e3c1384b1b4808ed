"""The plain search: ranges of the weight, then clips of the input. Every other search ends with it.

The best clip is far from the 0.95 that QVGen starts with, and lower for fewer bits: the fewer levels there are, the less can
be spent on rare extremes. So clips are searched per layer and timestep group, on recorded inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qvgen.quant.fake_quantizer import grouped_weight, weight_range
from qvgen.quant.grid import LayerGrid, quantize_tokens
from qvgen.quant.primitives import codes, dequantize, range_to_grid
from qvgen.quant.scheme import QuantArgs, QuantScheme
from qvgen.quant.search.settings import SearchSettings
from qvgen.quant.smoothing import transform_input


def search_grid(
    weight: torch.Tensor,
    inputs: list[torch.Tensor],
    scheme: QuantScheme,
    settings: SearchSettings,
    *,
    input_scale: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> LayerGrid:
    """Grid of a weight (N, K); `inputs` holds recorded rows (m, K) per timestep group.

    `input_scale` (K,) and the factors `low_rank`, (N, R) and (R, K), are what another search has found: ranges and clips are
    then searched on what is left to quantize.
    """
    empty = torch.empty(0)  # until the search below
    grid = LayerGrid(empty, None, None, None, input_scale, *(low_rank or (None, None)))
    residual = grid.residual(weight, scheme)
    scale, zero_point = search_weight_grid(residual, scheme.weights, settings)
    if scheme.input_activations is None:
        return replace(grid, scale=scale, zero_point=zero_point)
    importance = residual.square().sum(0)
    transformed = (transform_input(x, input_scale, scheme.input_rotation) for x in inputs)
    clips = [search_clips(x, importance, scheme.input_activations, settings.clip_candidates) for x in transformed]
    lower, upper = torch.tensor(clips, dtype=torch.float32).unbind(1)
    return replace(grid, scale=scale, zero_point=zero_point, clip_lower=lower, clip_upper=upper)


def search_weight_grid(
    weight: torch.Tensor, args: QuantArgs, settings: SearchSettings
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point (rows, G) that minimise sum |W - Q(W)|^mse_exponent per channel (group, tensor), over the ranges
    1.00, 0.99, ... of its minimum and maximum. Source: QVGen's code, section 4.1 (exponent 2.4, 80 candidates)."""
    lower, upper = weight_range(weight, args)
    grouped = grouped_weight(weight.detach().float(), args)
    best_error = torch.full_like(lower, torch.inf)
    best = range_to_grid(lower, upper, args)
    for i in range(settings.weight_candidates):
        shrink = 1 - 0.01 * i
        grid = range_to_grid(lower * shrink, upper * shrink, args)
        scale, zero_point = grid[0].unsqueeze(-1), grid[1].unsqueeze(-1)
        error = dequantize(codes(grouped, scale, zero_point, args), scale, zero_point).sub_(grouped)
        error = error.abs_().pow_(settings.mse_exponent).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = tuple(torch.where(better, new, old) for new, old in zip(grid, best, strict=True))  # type: ignore[assignment]
    return best[0], None if args.symmetric else best[1]


def search_clips(
    x: torch.Tensor, importance: torch.Tensor, args: QuantArgs, candidates: Sequence[float]
) -> tuple[float, float]:
    """Clips (lower, upper) that minimise sum_k importance_k (x_k - Q(x)_k)^2 over rows x (M, K).

    First one clip for both sides, then each side in turn. `importance` (K,) is the squared norm of the weight's column,
    so that an input counts by what it does to the output.
    """

    def best(clips: list[tuple[float, float]]) -> int:
        """The first of the clips with the least error; the device is waited for once for all of them."""
        found = []
        for lower, upper in clips:
            quantized = quantize_tokens(x, torch.tensor(lower), torch.tensor(upper), args)
            found.append(((quantized - x).square_() @ importance).sum())
        errors = torch.stack(found).tolist()
        return min(range(len(errors)), key=errors.__getitem__)

    both = candidates[best([(c, c) for c in candidates])]
    if args.symmetric:
        return both, both
    lower = candidates[best([(c, both) for c in candidates])]
    upper = candidates[best([(lower, c) for c in candidates])]
    return lower, upper
