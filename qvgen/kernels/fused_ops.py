"""Packed layers together with what comes before and after them in a transformer block: schemas and fake implementations.

    qvgen::layer_norm_linears(x, norm..., weights, ...) -> y[]           layers of the modulated layer norm of x (q, k, v)
    qvgen::linear_add_gated(x, weight, ..., residual, gate) -> y         residual + gate * layer(x)
    qvgen::layer_norm_feed_forward(x, norm..., weights, ..., gate) -> y  x + gate * feed_forward(norm(x))

    norm...              weight, bias, scale, shift, eps as layer_norm_modulate has them (block_ops.py)
    residual, gate       as x and gate of add_gated; x is (n, s, K)
    weights, ...         as in linear_ops.py
    y                    (n, s, N) in the dtype of x, or of the residual

The result is that of the ops one after the other, roundings to the dtype of x between them included. A backend that has
`Fused` keeps them in registers; in any other these ops call its own, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.profiler import record_function

from qvgen.kernels import block_ops, linear_ops, registry
from qvgen.kernels.registry import Arguments, LayerTensors

_NORM = "Tensor? norm_weight, Tensor? norm_bias, Tensor? scale, Tensor? shift, float eps"


class Norm(NamedTuple):
    """A layer norm with what modulates it."""

    weight: Tensor | None  # (d,)
    bias: Tensor | None
    scale: Tensor | None  # (n, 1, d) or (n, s, d)
    shift: Tensor | None
    eps: float

    @property
    def modulation(self) -> Tensor | None:
        """One of scale and shift, which have one shape."""
        return self.scale if self.scale is not None else self.shift


class Gated(NamedTuple):
    """What a layer's output y becomes: residual + y * gate."""

    residual: Tensor  # (n, s, N)
    gate: Tensor | None  # (n, 1, N) or (n, s, N); none: 1


class Fused(Protocol):
    """What a backend may have besides registry.Backend. Each takes what it is given, or returns False and has done nothing."""

    def fused_linear(
        self,
        x: Tensor,
        norm: Norm | None,
        layers: Sequence[LayerTensors],
        arguments: Arguments,
        outputs: Sequence[Tensor],
        gated: Gated | None,
    ) -> bool: ...

    def fused_feed_forward(
        self,
        x: Tensor,
        norm: Norm,
        up: LayerTensors,
        down: LayerTensors,
        arguments: Arguments,
        output: Tensor,
        gate: Tensor | None,
    ) -> bool: ...


def _layer_norm_linears(x: Tensor, *rest: Any) -> list[Tensor]:
    norm, (layers, arguments) = Norm(*rest[:5]), _packed(rest[5:])
    block_ops.check_layer_norm(x, *norm)
    linear_ops.check(x, layers, arguments)
    outputs = [linear_ops.empty_output(x, layer.weight_scale, None) for layer in layers]
    fused = _fused(arguments)
    if fused is None or not fused.fused_linear(x, norm, layers, arguments, outputs, None):
        registry.get(arguments.backend).linear(_run("layer_norm_modulate", x, *norm), layers, arguments, outputs, False)
    return outputs


def _linear_add_gated(x: Tensor, *rest: Any) -> Tensor:
    layer, arguments, gated = LayerTensors(*rest[:7]), Arguments(*rest[7:12]), Gated(*rest[12:])
    linear_ops.check(x, [layer], arguments)
    y = linear_ops.empty_output(x, layer.weight_scale, None)
    block_ops.check_add_gated(gated.residual, y, gated.gate)
    fused = _fused(arguments)
    if fused is not None and gated.residual.dtype == y.dtype and fused.fused_linear(x, None, [layer], arguments, [y], gated):
        return y
    registry.get(arguments.backend).linear(x, [layer], arguments, [y], False)
    return _run("add_gated", gated.residual, y, gated.gate)


def _layer_norm_feed_forward(x: Tensor, *rest: Any) -> Tensor:
    norm, (layers, arguments), gate = Norm(*rest[:5]), _packed(rest[5:-1]), rest[-1]
    if len(layers) != 2:
        raise ValueError(f"a feed-forward has 2 layers, got {len(layers)}")
    up, down = layers
    block_ops.check_layer_norm(x, *norm)
    linear_ops.check(x, layers, arguments)
    y = linear_ops.empty_output(x, down.weight_scale, None)
    block_ops.check_add_gated(x, y, gate)
    fused = _fused(arguments)
    if fused is not None and fused.fused_feed_forward(x, norm, up, down, arguments, y, gate):
        return y
    registry.get(arguments.backend).feed_forward(_run("layer_norm_modulate", x, *norm), up, down, arguments, y)
    return _run("add_gated", x, y, gate)


def _packed(rest: Sequence[Any]) -> tuple[list[LayerTensors], Arguments]:
    return linear_ops.layers_of(*rest[:7]), Arguments(*rest[7:])


def _fused(arguments: Arguments) -> Fused | None:
    backend = registry.get(arguments.backend)
    return cast(Fused, backend) if hasattr(backend, "fused_linear") else None


def _run(name: str, *arguments: Any) -> Tensor:
    """A block op inside of one of these; the profiler sees it as its own."""
    seen = record_function(f"qvgen::{name}") if torch.autograd._profiler_enabled() else nullcontext()
    with seen:
        return registry.block_op(name, arguments)(*arguments).contiguous()


def _fake_linears(x: Tensor, *rest: Any) -> list[Tensor]:
    return [linear_ops.empty_output(x, scale, None) for scale in rest[6]]


layer_norm_linears = linear_ops.define(
    "layer_norm_linears",
    f"(Tensor x, {_NORM}, {linear_ops.LAYERS}, {linear_ops.ARGUMENTS}) -> Tensor[]",
    _layer_norm_linears,
    _fake_linears,
)
linear_add_gated = linear_ops.define(
    "linear_add_gated",
    f"(Tensor x, {linear_ops.LAYER}, {linear_ops.ARGUMENTS}, Tensor residual, Tensor? gate) -> Tensor",
    _linear_add_gated,
    lambda x, *rest: rest[12].new_empty(rest[12].shape),
)
layer_norm_feed_forward = linear_ops.define(
    "layer_norm_feed_forward",
    f"(Tensor x, {_NORM}, {linear_ops.LAYERS}, {linear_ops.ARGUMENTS}, Tensor? gate) -> Tensor",
    _layer_norm_feed_forward,
    lambda x, *_: x.new_empty(x.shape),
)
