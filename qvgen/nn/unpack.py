"""Packed layers as linear layers again: the weight that computes what a packed layer computes with full-precision inputs.

    y = Q(W') x' + up (down x') + b,  x' = rotate(x / input_scale)        what a packed layer computes
    y = W x + b,                      W  = rotate(Q(W') + up down) / input_scale

The rotation undoes itself, because Hadamard matrices are symmetric. Quantization of the inputs has no place in a weight and is
gone. Without extras W is Q(W') bit for bit; with extras it is computed in float64 and rounded once.
"""

from __future__ import annotations

import torch
from torch import nn

from qvgen.device import widest_float
from qvgen.nn.packed_linear import PackedLinear, packed_layers
from qvgen.nn.targets import replace_module
from qvgen.nn.timestep import _enter, _leave
from qvgen.quant.rotation import rotate

_ADAPTED = ".base_layer"  # peft's name for the layer inside an adapter's


def effective_weight(layer: PackedLinear) -> torch.Tensor:
    """The weight W (N, K), float32."""
    weight = layer.dequantize()
    if not layer.has_extras:
        return weight
    wide = weight.to(widest_float(weight.device))
    if layer.low_rank_up is not None and layer.low_rank_down is not None:
        wide = wide + layer.low_rank_up.detach().to(wide) @ layer.low_rank_down.detach().to(wide)
    if layer.scheme.input_rotation is not None:
        wide = rotate(wide, layer.scheme.input_rotation)
    if layer.input_scale is not None:
        wide = wide / layer.input_scale
    return wide.float()


def unpack_(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Replace every PackedLinear by an nn.Linear and return their names; what told the layers the timestep goes too.

    A layer has the dtype of its bias, or `dtype` without one. Raises ValueError, naming the layer, if an adapter reads the
    same input, and if its weight is beyond what that dtype holds; then layers before it are unpacked already.
    """
    layers, names = list(packed_layers(model)), []
    if adapted := [name for name, _ in layers if name.endswith(_ADAPTED)]:
        name = adapted[0].removesuffix(_ADAPTED)
        raise ValueError(f"{name}: an adapter is loaded beside this packed layer; unload it, unpack, and load it again")
    for name, layer in layers:
        replace_module(model, name, _linear(name, layer, dtype if layer.bias is None else layer.bias.dtype))
        names.append(name)
    for hooks, ours in ((model._forward_pre_hooks, _enter), (model._forward_hooks, _leave)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            for table in (hooks, model._forward_pre_hooks_with_kwargs, model._forward_hooks_always_called):
                table.pop(key, None)
    return names


def _linear(name: str, layer: PackedLinear, dtype: torch.dtype) -> nn.Linear:
    exact = effective_weight(layer)
    weight = exact.to(dtype)
    if not weight.isfinite().all():
        largest = float(exact.abs().amax())
        raise ValueError(f"{name}: its weight reaches {largest:.3g}, more than {dtype} holds; unpack to bfloat16 or float32")
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return linear.train(layer.training)
