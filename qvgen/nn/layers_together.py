"""Several packed layers in one op: those that read the same input, and the two of a feed-forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from qvgen.kernels import gradient
from qvgen.kernels.linear_ops import quantized_feed_forward, quantized_linears
from qvgen.nn.packed_linear import PackedLinear


def brought_for_each_call(module: nn.Module) -> bool:
    """Whether accelerate or diffusers bring a module's tensors to the device when it is called (sequential and leaf-level
    offload): then it must be called, and reading its tensors is not enough."""
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")


def linears(x: torch.Tensor, layers: Sequence[PackedLinear]) -> list[torch.Tensor]:
    """Outputs of layers that read the same input, such as q, k and v, which is then read once.

    The layers must have one scheme and run in one backend, as all layers of a model do; the outputs are those of calling each
    of them, which is what happens where each transforms its input, or is brought to its device for each call.
    """
    if any(layer.has_extras or brought_for_each_call(layer) for layer in layers):
        return [layer(x) for layer in layers]
    for layer in layers:
        layer._check_input(x)
    tensors = [layer._tensors() for layer in layers]
    if gradient.is_asked_for(x, tensors):
        return [gradient.linear(x, t, layers[0]._arguments(x), layers[0].scheme.input_activations) for t in tensors]
    return quantized_linears(x, *map(list, zip(*tensors, strict=True)), *layers[0]._arguments(x))


def feed_forward(x: torch.Tensor, up: PackedLinear, down: PackedLinear) -> torch.Tensor:
    """down(gelu(up(x))) with the GELU in its tanh form: as calling `up` with its GELU and then `down`, but the wide
    intermediate is never written out (it is where layers transform their inputs)."""
    if any(layer.has_extras or brought_for_each_call(layer) for layer in (up, down)):
        return down(F.gelu(up(x), approximate="tanh"))
    up._check_input(x)
    down._ensure_prepared()
    tensors = up._tensors(), down._tensors()
    if gradient.is_asked_for(x, tensors):
        return gradient.feed_forward(x, *tensors, up._arguments(x), up.scheme.input_activations)
    return quantized_feed_forward(x, *map(list, zip(*tensors, strict=True)), *up._arguments(x))
