"""The ops behind every packed layer: their schemas and fake implementations, the same for all backends.

    qvgen::quantized_linear(x, weight, ...) -> y             one layer
    qvgen::quantized_linear_out(x, weight, ..., out)         the same, into `out`
    qvgen::quantized_linears(x, weights, ...) -> y[]         layers that read the same input (q, k, v): it is read once
    qvgen::quantized_feed_forward(x, weights, ...) -> y      two layers with a GELU between them
    qvgen::dequantized_weight(weight, ...) -> w              the weight that a layer multiplies with, (N, K) float32

    x                    (n, ..., K) float32, bfloat16 or float16, of any strides; n samples
    weight               the backend's own layout (registry.PreparedWeight)
    weight_scale         (N, G) float32
    weight_zero_point    (N, G) float32; none: symmetric
    weight_row_sum       (N, G) int32, sums of the weight's codes
    clip_lower, _upper   (timestep groups,) float32; none: inputs are not quantized
    timestep_group       (n,) or (1,) int64, the timestep group of each sample of x
    bias                 (N,), any float
    gelu                 GELU, in its tanh form, after the bias and before rounding to the output's dtype
    y                    (n, ..., N) in out_dtype, by default the dtype of x; `out` is float32 or bfloat16

With several layers there are lists of weights, scales, ... and the other arguments are common to all. The clips come whole,
with an index per sample, so that a fused kernel looks them up itself instead of being preceded by two gathers per layer.
The ops themselves have no gradient: qvgen/kernels/gradient.py has it. What they are given is checked, the tensors of a layer
where they are not the same as before (checked.py), because compiled backends read memory by it: errors are ValueErrors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qvgen.kernels import registry
from qvgen.kernels.checked import check_layer, shape_of, with_fake_input
from qvgen.kernels.direct import with_shortcut
from qvgen.kernels.registry import Arguments, LayerTensors, PreparedWeight
from qvgen.packing.bits import MAX_BITS, MIN_BITS, unpack
from qvgen.quant.primitives import dequantize

LAYER = (
    "Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor weight_row_sum, "
    "Tensor? clip_lower, Tensor? clip_upper, Tensor? bias"
)
LAYERS = (
    "Tensor[] weight, Tensor[] weight_scale, Tensor?[] weight_zero_point, Tensor[] weight_row_sum, "
    "Tensor?[] clip_lower, Tensor?[] clip_upper, Tensor?[] bias"
)
ARGUMENTS = "Tensor? timestep_group, int weight_bits, int? activation_bits, bool activation_symmetric, str backend"
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OUT_DTYPES = (torch.float32, torch.bfloat16)
_Many = Sequence[Tensor]
_Maybe = Sequence[Tensor | None]

# torch.library.custom_op would read better, but costs 7 us more per call.
_library = torch.library.Library("qvgen", "DEF")


def define(
    name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], written: int | None = None
) -> Callable[..., Any]:
    """The op qvgen::name, called past the dispatcher where that may be (direct.py); `written` as there."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qvgen::{name}", with_fake_input(fake), lib=_library)
    return with_shortcut(getattr(torch.ops.qvgen, name).default, implementation, written)


def _linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_row_sum: Tensor,
    clip_lower: Tensor | None,
    clip_upper: Tensor | None,
    bias: Tensor | None,
    timestep_group: Tensor | None,
    weight_bits: int,
    activation_bits: int | None,
    activation_symmetric: bool,
    backend: str,
    gelu: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    layer = LayerTensors(weight, weight_scale, weight_zero_point, weight_row_sum, clip_lower, clip_upper, bias)
    arguments = Arguments(timestep_group, weight_bits, activation_bits, activation_symmetric, backend)
    check(x, (layer,), arguments)
    y = empty_output(x, weight_scale, out_dtype)
    registry.get(backend).linear(x, [layer], arguments, [y], gelu)
    return y


def _linear_out(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_row_sum: Tensor,
    clip_lower: Tensor | None,
    clip_upper: Tensor | None,
    bias: Tensor | None,
    timestep_group: Tensor | None,
    weight_bits: int,
    activation_bits: int | None,
    activation_symmetric: bool,
    backend: str,
    out: Tensor,
    gelu: bool,
) -> None:
    layer = LayerTensors(weight, weight_scale, weight_zero_point, weight_row_sum, clip_lower, clip_upper, bias)
    arguments = Arguments(timestep_group, weight_bits, activation_bits, activation_symmetric, backend)
    check(x, (layer,), arguments)
    expected = (*x.shape[:-1], weight_scale.shape[0])
    if out is None or out.shape != expected or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and of shape {expected}, not {None if out is None else shape_of(out)}")
    if out.device != x.device:
        raise ValueError(f"out must be on {x.device}, as the input, not on {out.device}")
    if out.dtype not in _OUT_DTYPES:
        raise ValueError(f"out must be float32 or bfloat16, not {out.dtype}; let the op make its output instead")
    registry.get(backend).linear(x, [layer], arguments, [out], gelu)


def _linears(
    x: Tensor,
    weight: _Many,
    weight_scale: _Many,
    weight_zero_point: _Maybe,
    weight_row_sum: _Many,
    clip_lower: _Maybe,
    clip_upper: _Maybe,
    bias: _Maybe,
    timestep_group: Tensor | None,
    weight_bits: int,
    activation_bits: int | None,
    activation_symmetric: bool,
    backend: str,
) -> list[Tensor]:
    layers = layers_of(weight, weight_scale, weight_zero_point, weight_row_sum, clip_lower, clip_upper, bias)
    arguments = Arguments(timestep_group, weight_bits, activation_bits, activation_symmetric, backend)
    check(x, layers, arguments)
    outputs = [empty_output(x, layer.weight_scale, None) for layer in layers]
    registry.get(backend).linear(x, layers, arguments, outputs, False)
    return outputs


def _feed_forward(
    x: Tensor,
    weight: _Many,
    weight_scale: _Many,
    weight_zero_point: _Maybe,
    weight_row_sum: _Many,
    clip_lower: _Maybe,
    clip_upper: _Maybe,
    bias: _Maybe,
    timestep_group: Tensor | None,
    weight_bits: int,
    activation_bits: int | None,
    activation_symmetric: bool,
    backend: str,
) -> Tensor:
    layers = layers_of(weight, weight_scale, weight_zero_point, weight_row_sum, clip_lower, clip_upper, bias)
    arguments = Arguments(timestep_group, weight_bits, activation_bits, activation_symmetric, backend)
    if len(layers) != 2:
        raise ValueError(f"a feed-forward has 2 layers, got {len(layers)}")
    check(x, layers, arguments)
    y = empty_output(x, layers[1].weight_scale, None)
    registry.get(backend).feed_forward(x, layers[0], layers[1], arguments, y)
    return y


def _dequantized(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_row_sum: Tensor,
    in_features: int,
    weight_bits: int,
    backend: str,
) -> Tensor:
    layer = LayerTensors(weight, weight_scale, weight_zero_point, weight_row_sum, None, None, None)
    if weight is None:
        raise ValueError("weight is missing")
    check_layer(layer, weight.device, quantized=False)
    if not MIN_BITS <= weight_bits <= MAX_BITS or in_features < 1:
        raise ValueError(f"{in_features} inputs of {weight_bits} bits: there must be some, of {MIN_BITS} to {MAX_BITS} bits")
    prepared = PreparedWeight(backend, weight, weight_scale, weight_zero_point, weight_row_sum)
    codes = unpack(registry.get(backend).stored_words(prepared, in_features, weight_bits), weight_bits, in_features)
    zero_point = torch.full_like(weight_scale, 2 ** (weight_bits - 1)) if weight_zero_point is None else weight_zero_point
    grouped = codes.view(*weight_scale.shape, -1)
    return dequantize(grouped, weight_scale.unsqueeze(-1), zero_point.unsqueeze(-1)).view(codes.shape)


def layers_of(*tensors: _Maybe) -> list[LayerTensors]:
    if len({len(of_layers) for of_layers in tensors}) != 1 or not tensors[0]:
        raise ValueError(f"each list must have an entry for each layer, not {', '.join(str(len(t)) for t in tensors)}")
    return [LayerTensors(*layer) for layer in zip(*tensors, strict=True)]  # type: ignore[arg-type]


def empty_output(x: Tensor, weight_scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]), dtype=dtype or x.dtype)


def check(x: Tensor, layers: Sequence[LayerTensors], arguments: Arguments) -> None:
    group, bits = arguments.timestep_group, arguments.activation_bits
    if x is None or x.dtype not in INPUT_DTYPES or x.ndim == 0 or x.layout != torch.strided:
        found = "missing" if x is None else f"{x.dtype} {shape_of(x)}{'' if x.layout == torch.strided else f' {x.layout}'}"
        raise ValueError(f"input must be float32, bfloat16 or float16 of at least one dimension, not {found}")
    if not MIN_BITS <= arguments.weight_bits <= MAX_BITS:
        raise ValueError(f"weight_bits must be {MIN_BITS} to {MAX_BITS}, not {arguments.weight_bits}")
    if bits is not None:
        if not MIN_BITS <= bits <= MAX_BITS:
            raise ValueError(f"activation_bits must be {MIN_BITS} to {MAX_BITS}, or None for floating point, not {bits}")
        samples = x.shape[0] if x.ndim > 1 else 1
        if group is None or group.dtype != torch.int64 or group.ndim != 1 or group.device != x.device:
            raise ValueError("timestep_group must be int64 with one dimension, where the input is, if inputs are quantized")
        if group.shape[0] not in (1, samples):
            raise ValueError(f"{group.shape[0]} timestep groups were given for an input of {samples} samples")
    device, quantized = x.device, bits is not None
    for layer in layers:
        check_layer(layer, device, quantized)


def _fake_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, *rest: Any) -> Tensor:
    return empty_output(x, weight_scale, rest[-1])


def _fake_linears(x: Tensor, weight: _Many, weight_scale: _Many, *_: Any) -> list[Tensor]:
    return [empty_output(x, scale, None) for scale in weight_scale]


def _fake_feed_forward(x: Tensor, weight: _Many, weight_scale: _Many, *_: Any) -> Tensor:
    return empty_output(x, weight_scale[-1], None)


def _fake_dequantized(weight: Tensor, weight_scale: Tensor, *rest: Any) -> Tensor:
    return weight_scale.new_empty((weight_scale.shape[0], rest[2]))


quantized_linear = define(
    registry.OP, f"(Tensor x, {LAYER}, {ARGUMENTS}, bool gelu, ScalarType? out_dtype) -> Tensor", _linear, _fake_linear
)
quantized_linear_out = define(
    f"{registry.OP}_out",
    f"(Tensor x, {LAYER}, {ARGUMENTS}, Tensor(a!) out, bool gelu) -> ()",
    _linear_out,
    lambda *_: None,
    written=13,
)
quantized_linears = define(f"{registry.OP}s", f"(Tensor x, {LAYERS}, {ARGUMENTS}) -> Tensor[]", _linears, _fake_linears)
quantized_feed_forward = define(
    "quantized_feed_forward", f"(Tensor x, {LAYERS}, {ARGUMENTS}) -> Tensor", _feed_forward, _fake_feed_forward
)
dequantized_weight = define(
    "dequantized_weight",
    "(Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor weight_row_sum, int in_features, "
    "int weight_bits, str backend) -> Tensor",
    _dequantized,
    _fake_dequantized,
)
