"""Several packed layers in one op, with what comes before and after them in a transformer block: those that read the same
input, the two of a feed-forward, a layer norm, a residual.

The layers of a call must have one scheme and run in one backend, as all layers of a model do. Outputs are those of calling
each of them and each op between, which is what happens where a layer transforms its input, has hooks, or is brought to its
device for each call, and where a gradient is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from qvgen.kernels import gradient, whole_block
from qvgen.kernels.block_ops import add_gated, layer_norm_modulate
from qvgen.kernels.fused_ops import Norm, layer_norm_feed_forward, layer_norm_linears, linear_add_gated
from qvgen.kernels.linear_ops import quantized_feed_forward, quantized_linears
from qvgen.kernels.registry import LayerTensors
from qvgen.nn.packed_linear import PackedLinear


def brought_for_each_call(module: nn.Module) -> bool:
    """Whether accelerate or diffusers bring a module's tensors to the device when it is called (sequential and leaf-level
    offload): then it must be called, and reading its tensors is not enough. accelerate's hooks of a model on several devices
    (device_map="balanced") bring inputs only."""
    own = module.__dict__  # asking a module for what it lacks takes a microsecond
    return "_diffusers_hook" in own or ("_hf_hook" in own and getattr(own["_hf_hook"], "offload", True))


def is_spread(module: nn.Module) -> bool:
    """Whether accelerate has put the parts of `module` on several devices: then hooks must move what passes between them."""
    if "_hf_hook" not in module.__dict__:
        return False
    return len({tensor.device for tensor in (*module.parameters(), *module.buffers())}) > 1


def must_be_called(module: nn.Module) -> bool:
    """Whether calling `module` does more than its forward does."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or brought_for_each_call(module)


def linears(x: torch.Tensor, layers: Sequence[PackedLinear]) -> list[torch.Tensor]:
    """Outputs of layers that read the same input, such as q, k and v, which is then read once."""
    tensors = _tensors(x, layers)
    if tensors is None:
        return [layer(x) for layer in layers]
    if gradient.is_asked_for(x, tensors):
        return [gradient.linear(x, t, layers[0]._arguments(x), layers[0].scheme.input_activations) for t in tensors]
    return quantized_linears(x, *map(list, zip(*tensors, strict=True)), *layers[0]._arguments(x))


def normalized_linears(x: torch.Tensor, norm: Norm, layers: Sequence[PackedLinear]) -> list[torch.Tensor]:
    """`linears` of the modulated layer norm of x (n, s, K)."""
    tensors = None if _has_gradient(x, *norm[:4]) else _tensors(x, layers)
    if tensors is None or gradient.is_asked_for(x, tensors):
        return linears(layer_norm_modulate(x, *norm), layers)
    return layer_norm_linears(x, *norm, *map(list, zip(*tensors, strict=True)), *layers[0]._arguments(x))


def added_linear(x: torch.Tensor, layer: PackedLinear, residual: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """residual + gate * layer(x); x (n, s, K)."""
    tensors = None if _has_gradient(residual, gate) else _tensors(x, [layer])
    if tensors is None or gradient.is_asked_for(x, tensors):
        return add_gated(residual, layer(x), gate)
    return linear_add_gated(x, *tensors[0], *layer._arguments(x), residual, gate)


def feed_forward(x: torch.Tensor, up: PackedLinear, down: PackedLinear) -> torch.Tensor:
    """down(gelu(up(x))) with the GELU in its tanh form: as calling `up` with its GELU and then `down`, but the wide
    intermediate is never written out (it is where layers transform their inputs)."""
    tensors = _tensors(x, [up], [down])
    if tensors is None:
        return down(F.gelu(up(x), approximate="tanh"))
    if gradient.is_asked_for(x, tensors):
        return gradient.feed_forward(x, tensors[0], tensors[1], up._arguments(x), up.scheme.input_activations)
    return quantized_feed_forward(x, *map(list, zip(*tensors, strict=True)), *up._arguments(x))


def added_feed_forward(
    x: torch.Tensor, norm: Norm, up: PackedLinear, down: PackedLinear, gate: torch.Tensor | None
) -> torch.Tensor:
    """x + gate * feed_forward(norm(x)); x (n, s, K)."""
    tensors = None if _has_gradient(x, *norm[:4], gate) else _tensors(x, [up], [down])
    if tensors is None or gradient.is_asked_for(x, tensors):
        return add_gated(x, feed_forward(layer_norm_modulate(x, *norm), up, down), gate)
    return layer_norm_feed_forward(x, *norm, *map(list, zip(*tensors, strict=True)), *up._arguments(x), gate)


def in_one_call(
    x: torch.Tensor, steps: Sequence[whole_block.Step], layers: Sequence[Sequence[PackedLinear]]
) -> torch.Tensor | None:
    """x (n, s, K) after all steps of a transformer block, where they can be one call (kernels/whole_block.py); else None.
    `layers` of each step: to q, k, v and out, or up and down."""
    if not whole_block.may_run(x):
        return None
    tensors = [_tensors(x, of_step[:1], of_step[1:]) for of_step in layers]
    if any(of_step is None for of_step in tensors):
        return None
    for step, of_step in zip(steps, layers, strict=True):
        if step.attention is not None and (text := step.attention.text) is not None:
            of_step[1]._check_input(text)
    return whole_block.transformer_block(x, steps, cast(whole_block.Layers, tensors), layers[0][0]._arguments(x))


def _tensors(x: torch.Tensor, readers: Sequence[PackedLinear], then: Sequence[PackedLinear] = ()) -> list[LayerTensors] | None:
    """What the ops get of the layers that read x, and of those after them; None where they must be called one by one."""
    layers = [*readers, *then]
    if any(layer.has_extras or must_be_called(layer) for layer in layers):
        return None
    for layer in readers:
        layer._check_input(x)
    for layer in then:
        layer._ensure_prepared()
    return [layer._tensors() for layer in layers]


def _has_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
