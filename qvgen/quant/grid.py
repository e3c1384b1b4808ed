"""The grid of one layer: the quantizers that a search finds, and the error that they cause. The searches: quant/search."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from qvgen.device import widest_float
from qvgen.quant.fake_quantizer import WeightQuantizer, weight_range
from qvgen.quant.primitives import codes, dequantize, range_to_grid, token_grid
from qvgen.quant.scheme import QuantArgs, QuantScheme
from qvgen.quant.smoothing import transform_input, transform_weight


@dataclass(frozen=True)
class LayerGrid:
    """Calibrated quantizers of one layer: weight scale and zero point (rows, G); clips (timestep groups,) in (0, 1].

    Schemes with extras have `input_scale` (K,) too, and `low_rank_up` (N, R) and `low_rank_down` (R, K) of the 16-bit branch.
    The grid then belongs to the `residual`; the branch reads the same transformed inputs, unquantized.
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
        (n, k), device = weight.shape, weight.device
        rank = scheme.rank_of(n, k)
        scheme.check_rotation(k)
        rotated = transform_weight(weight.detach().float(), None, scheme.input_rotation)
        scale, zero_point = range_to_grid(*weight_range(rotated, scheme.weights), scheme.weights)
        # Two tensors: safetensors refuses to write one under two names.
        lower, upper = (
            None if scheme.input_activations is None else torch.ones(scheme.timestep_groups, device=device) for _ in range(2)
        )
        return cls(
            scale,
            None if scheme.weights.symmetric else zero_point,
            lower,
            upper,
            torch.ones(k, device=device) if scheme.input_scaling else None,
            torch.zeros(n, rank, device=device) if rank else None,
            torch.zeros(rank, k, device=device) if rank else None,
        )

    def residual(self, weight: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
        """The part of a weight (N, K) that is packed, float32: the scaled and rotated weight minus the low-rank branch."""
        scheme.check_rotation(weight.shape[1])
        weight = transform_weight(weight.detach().float(), self.input_scale, scheme.input_rotation)
        if self.low_rank_up is None or self.low_rank_down is None:
            return weight
        return weight - self.low_rank_up @ self.low_rank_down

    def check(self, name: str, weight: torch.Tensor, scheme: QuantScheme) -> None:
        """Raise ValueError, with the layer's name, if the grid lacks a tensor that the scheme needs, or has one that it does
        not."""
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

    def to(self, device: torch.device) -> LayerGrid:
        """The same grid with its tensors on `device`."""
        return LayerGrid(*(None if value is None else value.to(device) for value in vars(self).values()))  # type: ignore[arg-type]

    def to_tensors(self) -> dict[str, torch.Tensor]:
        return {name: value.contiguous() for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> LayerGrid:
        return cls(*(tensors.get(field.name) for field in fields(cls)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class LayerError:
    """Squared errors of one layer's weight, input and output, each relative to its squared norm. Choices are made by
    `output`."""

    weight: float
    activation: float
    output: float


def layer_error(weight: torch.Tensor, grid: LayerGrid, inputs: list[torch.Tensor], scheme: QuantScheme) -> LayerError:
    """Errors that `grid` causes in a layer of weight (N, K), on recorded rows (m, K) of its inputs per timestep group. Where
    the scheme scales or rotates, the errors of weight and input are those of the transformed ones; the output is always the
    layer's own. Computed where the weight is."""
    weight, grid = weight.detach().float(), grid.to(weight.device)
    residual = grid.residual(weight, scheme)
    quantized_weight = WeightQuantizer(scheme.weights, grid.scale, grid.zero_point).dequantized(residual)
    wide = widest_float(weight.device)
    totals = torch.zeros(4, dtype=wide, device=weight.device)
    for group, rows in enumerate(inputs):
        x = rows.to(weight.device)
        quantized = inner = transform_input(x, grid.input_scale, scheme.input_rotation)
        if scheme.input_activations is not None:
            assert grid.clip_lower is not None and grid.clip_upper is not None
            quantized = quantize_tokens(inner, grid.clip_lower[group], grid.clip_upper[group], scheme.input_activations)
        output, found = x @ weight.T, quantized @ quantized_weight.T
        if grid.low_rank_up is not None and grid.low_rank_down is not None:
            found += inner @ grid.low_rank_down.T @ grid.low_rank_up.T
        parts = (quantized - inner, inner, found - output, output)
        totals += torch.stack([p.to(wide).square().sum() for p in parts])
    whole = transform_weight(weight, grid.input_scale, scheme.input_rotation)
    weight_error = (quantized_weight - residual).square().sum() / whole.square().sum()
    return LayerError(float(weight_error), float(totals[0] / totals[1]), float(totals[2] / totals[3]))


def quantize_tokens(x: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, args: QuantArgs) -> torch.Tensor:
    """x (..., K) rounded to the dynamic grid of each token."""
    scale, zero_point = token_grid(x, lower, upper, args)
    return dequantize(codes(x, scale, zero_point, args), scale, zero_point)
