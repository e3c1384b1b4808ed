"""The ops behind every packed layer: their schemas and fake implementations, the same for all backends.

    qvgen::quantized_linear(x, weight, ...) -> y             one layer
    qvgen::quantized_linear_out(x, weight, ..., out)         the same, into `out`
    qvgen::quantized_linears(x, weights, ...) -> y[]         layers that read the same input (q, k, v): it is read once
    qvgen::quantized_feed_forward(x, weights, ...) -> y      two layers with a GELU between them

    x                    (n, ..., K) float32, bfloat16 or float16; n samples
    weight               the backend's own layout (registry.PreparedWeight)
    weight_scale         (N, G) float32
    weight_zero_point    (N, G) float32; none: symmetric
    weight_row_sum       (N, G) int32, sums of the weight's codes
    clip_lower, _upper   (timestep groups,) float32; none: inputs are not quantized
    timestep_group       (n,) or (1,) int64, the timestep group of each sample of x
    bias                 (N,), any float
    gelu                 GELU, in its tanh form, after the bias and before rounding to the output's dtype
    y                    (n, ..., N) in out_dtype, by default the dtype of x

With several layers there are lists of weights, scales, ... and the other arguments are common to all. The clips come whole,
with an index per sample, so that a fused kernel looks them up itself instead of being preceded by two gathers per layer.
There is no gradient: packed layers are for inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qvgen.kernels import registry
from qvgen.kernels.cpu.backend import CpuBackend
from qvgen.kernels.reference import ReferenceBackend
from qvgen.kernels.registry import Arguments, LayerTensors

registry.register(ReferenceBackend())
registry.register(CpuBackend())

_LAYER = (
    "Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor weight_row_sum, "
    "Tensor? clip_lower, Tensor? clip_upper, Tensor? bias"
)
_LAYERS = (
    "Tensor[] weight, Tensor[] weight_scale, Tensor?[] weight_zero_point, Tensor[] weight_row_sum, "
    "Tensor?[] clip_lower, Tensor?[] clip_upper, Tensor?[] bias"
)
_ARGUMENTS = "Tensor? timestep_group, int weight_bits, int? activation_bits, bool activation_symmetric, str backend"

# torch.library.custom_op would read better, but costs 7 us more per call.
_library = torch.library.Library("qvgen", "DEF")


def _define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qvgen::{name}", fake, lib=_library)
    return getattr(torch.ops.qvgen, name).default


def _linear(x: Tensor, *rest: Any) -> Tensor:
    tensors, arguments, (gelu, out_dtype) = LayerTensors(*rest[:7]), Arguments(*rest[7:12]), rest[12:]
    y = _empty_output(x, tensors, out_dtype)
    registry.get(arguments.backend).linear(x, [tensors], arguments, [y], gelu)
    return y


def _linear_out(x: Tensor, *rest: Any) -> None:
    tensors, arguments, (out, gelu) = LayerTensors(*rest[:7]), Arguments(*rest[7:12]), rest[12:]
    if out.shape != (expected := _output_shape(x, tensors)) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and of shape {tuple(expected)}, not {tuple(out.shape)}")
    registry.get(arguments.backend).linear(x, [tensors], arguments, [out], gelu)


def _linears(x: Tensor, *rest: Any) -> list[Tensor]:
    layers, arguments = [LayerTensors(*tensors) for tensors in zip(*rest[:7], strict=True)], Arguments(*rest[7:])
    outputs = [_empty_output(x, tensors, None) for tensors in layers]
    registry.get(arguments.backend).linear(x, layers, arguments, outputs, False)
    return outputs


def _feed_forward(x: Tensor, *rest: Any) -> Tensor:
    layers, arguments = [LayerTensors(*tensors) for tensors in zip(*rest[:7], strict=True)], Arguments(*rest[7:])
    if len(layers) != 2:
        raise ValueError(f"a feed-forward has 2 layers, got {len(layers)}")
    y = _empty_output(x, layers[1], None)
    registry.get(arguments.backend).feed_forward(x, layers[0], layers[1], arguments, y)
    return y


def _output_shape(x: Tensor, tensors: LayerTensors) -> torch.Size:
    return torch.Size((*x.shape[:-1], tensors.weight_scale.shape[0]))


def _empty_output(x: Tensor, tensors: LayerTensors, dtype: torch.dtype | None) -> Tensor:
    return x.new_empty(_output_shape(x, tensors), dtype=dtype or x.dtype)


def _fake_linear(x: Tensor, *rest: Any) -> Tensor:
    return _empty_output(x, LayerTensors(*rest[:7]), rest[13])


def _fake_linears(x: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], scale.shape[0])) for scale in rest[1]]


def _fake_feed_forward(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[1][-1].shape[0]))


quantized_linear = _define(
    registry.OP, f"(Tensor x, {_LAYER}, {_ARGUMENTS}, bool gelu, ScalarType? out_dtype) -> Tensor", _linear, _fake_linear
)
quantized_linear_out = _define(
    f"{registry.OP}_out",
    f"(Tensor x, {_LAYER}, {_ARGUMENTS}, Tensor(a!) out, bool gelu) -> ()",
    _linear_out,
    lambda *_: None,
)
quantized_linears = _define(f"{registry.OP}s", f"(Tensor x, {_LAYERS}, {_ARGUMENTS}) -> Tensor[]", _linears, _fake_linears)
quantized_feed_forward = _define(
    "quantized_feed_forward", f"(Tensor x, {_LAYERS}, {_ARGUMENTS}) -> Tensor", _feed_forward, _fake_feed_forward
)
