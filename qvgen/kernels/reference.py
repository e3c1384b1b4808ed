"""The reference backend: plain PyTorch, for every op, width, strategy, shape and device. What others are tested against.

    Y = s_a s_w [ q_a . q_w - z_a sum q_w - z_w sum q_a + K z_a z_w ] + bias
      = s_a s_w [ (q_a - z_a) . q_w - z_w sum (q_a - z_a) ] + bias

The second form is the same in exact arithmetic and needs fewer passes. Both its sums are of integers and computed exactly;
only the products with a float zero point and with the scales round, in float32. NaN or Inf in a token makes its scale NaN
(primitives.range_to_grid), and with it all outputs of that token and no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F

from qvgen.kernels import expressions
from qvgen.kernels.registry import Arguments, BlockOp, LayerTensors, PackedWeight, PreparedWeight
from qvgen.packing.bits import pack, unpack
from qvgen.quant.primitives import codes, dequantize, token_grid
from qvgen.quant.scheme import QuantArgs

_EXACT_FLOAT32 = 2**24  # every integer up to here is a float32


class ReferenceBackend:
    """Codes are kept as one byte each: twice the packed size at 4 bits, half of bfloat16."""

    name = "reference"
    devices: tuple[str, ...] = ()
    block_ops: Mapping[str, BlockOp] = {name: BlockOp(run) for name, run in expressions.EXPRESSIONS.items()}

    def available(self) -> str:
        return ""

    def supports(self, layer: PackedWeight) -> str:
        return ""

    def slower(self, layer: PackedWeight) -> str:
        return ""

    def prepare(self, layer: PackedWeight) -> PreparedWeight:
        """Codes (N, K) uint8, or as int8 without their zero point where that is the same for all (symmetric)."""
        weight = unpack(layer.words, layer.args.num_bits, layer.in_features)
        if layer.args.symmetric:
            weight = (weight - layer.args.symmetric_zero_point).view(torch.int8)  # wraps, as meant
        n = weight.shape[0]
        # contiguous: an operator's arguments may not share memory within themselves
        scale = layer.scale.expand(n, -1).contiguous()
        zero_point = None if layer.zero_point is None else layer.zero_point.expand(n, -1).contiguous()
        return PreparedWeight(self.name, weight, scale, zero_point, layer.row_sum)

    def stored_words(self, prepared: PreparedWeight, in_features: int, num_bits: int) -> torch.Tensor:
        codes = prepared.weight
        if codes.dtype == torch.int8:
            codes = codes.view(torch.uint8) + 2 ** (num_bits - 1)
        return pack(codes, num_bits)

    def linear(
        self,
        x: torch.Tensor,
        layers: Sequence[LayerTensors],
        arguments: Arguments,
        outputs: Sequence[torch.Tensor],
        gelu: bool,
    ) -> None:
        for layer, output in zip(layers, outputs, strict=True):
            y = _linear(x, layer, arguments)
            output.copy_(F.gelu(y, approximate="tanh") if gelu else y)

    def feed_forward(
        self, x: torch.Tensor, up: LayerTensors, down: LayerTensors, arguments: Arguments, output: torch.Tensor
    ) -> None:
        hidden = F.gelu(_linear(x, up, arguments), approximate="tanh").to(x.dtype)
        output.copy_(_linear(hidden, down, arguments))


def _linear(x: torch.Tensor, layer: LayerTensors, arguments: Arguments) -> torch.Tensor:
    """(n, ..., N) float32, or the dtype of x if inputs are not quantized."""
    if arguments.activation_bits is None:
        dense = _dequantized(layer.weight, layer.weight_scale, layer.weight_zero_point).to(x.dtype)
        return F.linear(x, dense, None if layer.bias is None else layer.bias.to(x.dtype))
    group, weight_bits = arguments.timestep_group, arguments.weight_bits
    assert layer.clip_lower is not None and layer.clip_upper is not None and group is not None
    if group.is_cpu and group.numel() and not 0 <= int(group.min()) <= int(group.max()) < layer.clip_lower.shape[0]:
        raise RuntimeError(f"a timestep group has no clips: {group.tolist()} of {layer.clip_lower.shape[0]}")
    args = _token_args(arguments.activation_bits, arguments.activation_symmetric)
    per_sample = (-1, *[1] * (x.ndim - 1))
    x_fp32 = x.float().contiguous()
    scale, zero_point = token_grid(
        x_fp32, layer.clip_lower[group].view(per_sample), layer.clip_upper[group].view(per_sample), args
    )
    centred = codes(x_fp32, scale, zero_point, args).sub_(zero_point)
    n, k = layer.weight.shape
    rows = x.shape[:-1].numel()
    # Symmetric codes were stored centred, so both factors may be signed; these bound their absolute values.
    largest = args.max_code * (2 ** (weight_bits - 1) if layer.weight_zero_point is None else 2**weight_bits - 1)
    y_MN = _integer_linear(centred.reshape(rows, k), layer.weight, layer.weight_scale, layer.weight_zero_point, largest)
    y_MN.mul_(scale.reshape(rows, 1))
    if layer.bias is not None:
        y_MN.add_(layer.bias)
    return y_MN.view(*x.shape[:-1], n)


def _integer_linear(
    a_MK: torch.Tensor, codes_NK: torch.Tensor, scale_NG: torch.Tensor, zero_point_NG: torch.Tensor | None, largest: int
) -> torch.Tensor:
    """s_w [a . q_w - z_w sum a] (M, N) float32, summed over the weight's groups."""
    groups = scale_NG.shape[1]
    size = codes_NK.shape[1] // groups
    total = None
    for g in range(groups):
        a = a_MK[:, g * size : (g + 1) * size]
        part = _exact_matmul(a, codes_NK[:, g * size : (g + 1) * size], largest)
        if zero_point_NG is not None:
            part.addr_(a.sum(1, dtype=part.dtype), zero_point_NG[:, g].to(part.dtype), alpha=-1)
        part = part.float().mul_(scale_NG[:, g])
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _exact_matmul(a_MK: torch.Tensor, codes_NK: torch.Tensor, largest: int) -> torch.Tensor:
    """a . q (M, N), exact: in float32 where no sum of K products, each at most `largest`, can leave its integers; else in
    pieces of K for which that holds, added up in float64."""
    step = (_EXACT_FLOAT32 - 1) // largest
    if a_MK.shape[1] <= step:
        return a_MK @ codes_NK.to(torch.float32).T
    total = a_MK.new_zeros((a_MK.shape[0], codes_NK.shape[0]), dtype=torch.float64)
    for start in range(0, a_MK.shape[1], step):
        total += a_MK[:, start : start + step] @ codes_NK[:, start : start + step].to(torch.float32).T
    return total


def _dequantized(codes_NK: torch.Tensor, scale_NG: torch.Tensor, zero_point_NG: torch.Tensor | None) -> torch.Tensor:
    n, groups = scale_NG.shape
    zero_point = torch.zeros_like(scale_NG) if zero_point_NG is None else zero_point_NG
    return dequantize(codes_NK.view(n, groups, -1), scale_NG.unsqueeze(-1), zero_point.unsqueeze(-1)).view(n, -1)


@cache
def _token_args(num_bits: int, symmetric: bool) -> QuantArgs:
    return QuantArgs(num_bits=num_bits, symmetric=symmetric, strategy="token")
