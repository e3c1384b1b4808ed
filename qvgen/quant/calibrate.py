"""Calibration: search the grid of every weight and the clips of every layer's input before any training.

The best clip is far from the 0.95 that QVGen starts with, and falls with the width of the layer (fewer levels must spend
less on rare extremes), so it is searched per layer and timestep group, on recorded inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import nn

from qvgen.quant.fake_quantizer import WeightQuantizer, grouped_weight, weight_range
from qvgen.quant.primitives import codes, dequantize, range_to_grid, token_grid
from qvgen.quant.scheme import QuantArgs, QuantScheme
from qvgen.quant.smoothing import transform_input, transform_weight


@dataclass(frozen=True)
class LayerGrid:
    """Calibrated quantizers of one layer: weight scale and zero point (rows, G); clips (timestep groups,) in (0, 1].

    With a scheme that adds to the layer also `input_scale` (K,), and `low_rank_up` (N, R) and `low_rank_down` (R, K) of the
    16-bit branch. The grid is then that of `residual`, and the branch reads the same transformed inputs, not quantized.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    clip_lower: torch.Tensor | None
    clip_upper: torch.Tensor | None
    input_scale: torch.Tensor | None = None
    low_rank_up: torch.Tensor | None = None
    low_rank_down: torch.Tensor | None = None

    @classmethod
    def min_max(cls, weight: torch.Tensor, scheme: QuantScheme) -> LayerGrid:
        """Whole ranges, nothing searched: what rounding to nearest uses. Inputs are scaled by 1, a branch is empty (0)."""
        n, k = weight.shape
        rank = scheme.rank_of(n, k)
        scheme.check_rotation(k)
        rotated = transform_weight(weight.detach().float(), None, scheme.input_rotation)
        scale, zero_point = range_to_grid(*weight_range(rotated, scheme.weights), scheme.weights)
        whole = None if scheme.input_activations is None else torch.ones(scheme.timestep_groups)
        return cls(
            scale,
            None if scheme.weights.symmetric else zero_point,
            whole,
            whole,
            torch.ones(k) if scheme.input_scaling else None,
            torch.zeros(n, rank) if rank else None,
            torch.zeros(rank, k) if rank else None,
        )

    def residual(self, weight: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
        """What of a weight (N, K) is packed, float32: it scaled and rotated, less the low-rank branch."""
        scheme.check_rotation(weight.shape[1])
        weight = transform_weight(weight.detach().float(), self.input_scale, scheme.input_rotation)
        if self.low_rank_up is None or self.low_rank_down is None:
            return weight
        return weight - self.low_rank_up @ self.low_rank_down

    def check(self, name: str, weight: torch.Tensor, scheme: QuantScheme) -> None:
        """Raise ValueError, with the layer's name, if the grid lacks what the scheme adds to a layer, or has too much."""
        n, k = weight.shape
        rank = scheme.rank_of(n, k)
        expected = {
            "input_scale": (k,) if scheme.input_scaling else None,
            "low_rank_up": (n, rank) if rank else None,
            "low_rank_down": (rank, k) if rank else None,
        }
        for field, shape in expected.items():
            tensor = getattr(self, field)
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape:
                raise ValueError(
                    f"grid of layer {name}: {field} is {found or 'absent'}, this scheme needs {shape or 'none'}; "
                    "run calibration with this scheme"
                )

    def to_tensors(self) -> dict[str, torch.Tensor]:
        return {name: value.contiguous() for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> LayerGrid:
        return cls(*(tensors.get(field.name) for field in fields(cls)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class LayerError:
    """Squared errors of one layer relative to the squared norm of what they disturb; `output` is what counts."""

    weight: float
    activation: float
    output: float


def search_weight_grid(
    weight: torch.Tensor, args: QuantArgs, *, candidates: int, exponent: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point (rows, G) that minimise sum |W - Q(W)|^exponent per channel (group, tensor), over the ranges
    1.00, 0.99, ... of its minimum and maximum. Source: QVGen's code, section 4.1 (exponent 2.4, 80 candidates)."""
    lower, upper = weight_range(weight, args)
    grouped = grouped_weight(weight.detach().float(), args)
    best_error = torch.full_like(lower, torch.inf)
    best = range_to_grid(lower, upper, args)
    for i in range(candidates):
        shrink = 1 - 0.01 * i
        grid = range_to_grid(lower * shrink, upper * shrink, args)
        scale, zero_point = grid[0].unsqueeze(-1), grid[1].unsqueeze(-1)
        error = dequantize(codes(grouped, scale, zero_point, args), scale, zero_point).sub_(grouped)
        error = error.abs_().pow_(exponent).sum(-1)
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

    def error(lower: float, upper: float) -> float:
        quantized = quantize_tokens(x, torch.tensor(lower), torch.tensor(upper), args)
        return float(((quantized - x).square_() @ importance).sum())

    both = min(candidates, key=lambda c: error(c, c))
    if args.symmetric:
        return both, both
    lower = min(candidates, key=lambda c: error(c, both))
    upper = min(candidates, key=lambda c: error(lower, c))
    return lower, upper


class InputRecorder:
    """Keeps up to `rows` input rows per layer and timestep group, chosen at random with a fixed seed."""

    def __init__(self, groups: int, rows: int, seed: int = 0) -> None:
        self.groups, self.rows = groups, rows
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: dict[tuple[str, int], list[torch.Tensor]] = {}
        self.group: torch.Tensor | None = None  # timestep group of each sample of the current call

    @contextmanager
    def attached(self, layers: dict[str, nn.Module]) -> Iterator[InputRecorder]:
        handles = [layer.register_forward_pre_hook(partial(self._record, name)) for name, layer in layers.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def inputs(self, layer: str, group: int) -> torch.Tensor:
        """Recorded rows (m, K) float32, m <= rows. Raises ValueError if the layer saw no sample of this group."""
        kept = self._kept.get((layer, group))
        if not kept:
            raise ValueError(
                f"layer {layer} saw no calibration input of timestep group {group}; use at least "
                f"{self.groups} calibration clips (one per timestep group)"
            )
        return torch.cat(kept)

    def _record(self, layer: str, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x, groups = args[0], self.group
        assert groups is not None
        if not torch.isfinite(x).all():
            raise ValueError(f"calibration data gives NaN or Inf at the input of layer {layer}; check the clips and the model")
        for group in groups.unique().tolist():
            kept = self._kept.setdefault((layer, group), [])
            missing = self.rows - sum(map(len, kept))
            if missing <= 0:
                continue
            x_MK = x[groups == group].reshape(-1, x.shape[-1])
            # At most half of what is missing from one call, so that several clips are represented.
            take = min(len(x_MK), max(missing // 2, 16), missing)
            index = torch.randperm(len(x_MK), generator=self._generator)[:take]
            kept.append(x_MK[index.to(x.device)].float().cpu())


def calibrate_layer(
    layer: nn.Linear,
    inputs: list[torch.Tensor],
    scheme: QuantScheme,
    *,
    weight_candidates: int,
    mse_exponent: float,
    clip_candidates: Sequence[float],
) -> LayerGrid:
    """Searched grid of one layer; `inputs` holds recorded rows (m, K) per timestep group.

    Methods that scale inputs or add a branch have a function like this of their own (qvgen/methods).
    """
    return search_grid(
        layer.weight,
        inputs,
        scheme,
        weight_candidates=weight_candidates,
        mse_exponent=mse_exponent,
        clip_candidates=clip_candidates,
    )


def search_grid(
    weight: torch.Tensor,
    inputs: list[torch.Tensor],
    scheme: QuantScheme,
    *,
    input_scale: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    weight_candidates: int,
    mse_exponent: float,
    clip_candidates: Sequence[float],
) -> LayerGrid:
    """Grid of a weight (N, K) under the given extras: ranges and clips are searched on what is quantized with them."""
    empty = torch.empty(0)  # until the search below
    grid = LayerGrid(empty, None, None, None, input_scale, *(low_rank or (None, None)))
    residual = grid.residual(weight, scheme)
    scale, zero_point = search_weight_grid(residual, scheme.weights, candidates=weight_candidates, exponent=mse_exponent)
    if scheme.input_activations is None:
        return replace(grid, scale=scale, zero_point=zero_point)
    importance = residual.square().sum(0)
    transformed = (transform_input(x, input_scale, scheme.input_rotation) for x in inputs)
    clips = [search_clips(x, importance, scheme.input_activations, clip_candidates) for x in transformed]
    lower, upper = torch.tensor(clips, dtype=torch.float32).unbind(1)
    return replace(grid, scale=scale, zero_point=zero_point, clip_lower=lower, clip_upper=upper)


def layer_error(layer: nn.Linear, grid: LayerGrid, inputs: list[torch.Tensor], scheme: QuantScheme) -> LayerError:
    """What `grid` costs on the recorded inputs. Where the scheme scales or rotates, weight and inputs count as they are
    then; the outputs are the layer's own in any case."""
    weight = layer.weight.detach().float()
    residual = grid.residual(weight, scheme)
    quantized_weight = WeightQuantizer(scheme.weights, grid.scale, grid.zero_point).dequantized(residual)
    totals = torch.zeros(4, dtype=torch.float64)
    for group, x in enumerate(inputs):
        quantized = inner = transform_input(x, grid.input_scale, scheme.input_rotation)
        if scheme.input_activations is not None:
            assert grid.clip_lower is not None and grid.clip_upper is not None
            quantized = quantize_tokens(inner, grid.clip_lower[group], grid.clip_upper[group], scheme.input_activations)
        output, found = x @ weight.T, quantized @ quantized_weight.T
        if grid.low_rank_up is not None and grid.low_rank_down is not None:
            found += inner @ grid.low_rank_down.T @ grid.low_rank_up.T
        parts = (quantized - inner, inner, found - output, output)
        totals += torch.stack([p.double().square().sum() for p in parts])
    whole = transform_weight(weight, grid.input_scale, scheme.input_rotation)
    weight_error = (quantized_weight - residual).square().sum() / whole.square().sum()
    return LayerError(float(weight_error), float(totals[0] / totals[1]), float(totals[2] / totals[3]))


def quantize_tokens(x: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, args: QuantArgs) -> torch.Tensor:
    """x (..., K) on the grid of each token."""
    scale, zero_point = token_grid(x, lower, upper, args)
    return dequantize(codes(x, scale, zero_point, args), scale, zero_point)
