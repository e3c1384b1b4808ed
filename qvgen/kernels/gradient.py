"""The gradient of a packed layer: that of fake quantization, of whose forward the packed one is the exact form.

    dx = (dy W^) where the input's code was not clamped, else 0        W^ the dequantized weight
    dbias = sum of dy over tokens

Rounding has gradient 1 (straight through) and the token's range none, as in training. Codes, scales and clips are not
trained here. An input or bias that asks for a gradient gets it in fused ops too, which then run layer by layer, in more
passes over memory; their outputs may differ in the last rounding from those without a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qvgen.kernels.linear_ops import dequantized_weight, quantized_linear
from qvgen.kernels.registry import Arguments, LayerTensors
from qvgen.quant.primitives import fake_quantize, token_grid
from qvgen.quant.scheme import QuantArgs


def is_asked_for(x: Tensor, layers: Sequence[LayerTensors]) -> bool:
    """Whether autograd wants the gradient of x or of a layer's bias."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(layer.bias is not None and layer.bias.requires_grad for layer in layers)


def linear(x: Tensor, layer: LayerTensors, arguments: Arguments, activations: QuantArgs | None) -> Tensor:
    """quantized_linear, (n, ..., N) in the dtype of x, with a gradient for x and the bias."""
    quantized = x
    if activations is not None:
        assert layer.clip_lower is not None and layer.clip_upper is not None and arguments.timestep_group is not None
        x_fp32, group, per_sample = x.float(), arguments.timestep_group, (-1, *[1] * (x.ndim - 1))
        clips = layer.clip_lower[group].view(per_sample), layer.clip_upper[group].view(per_sample)
        quantized = fake_quantize(x_fp32, *token_grid(x_fp32, *clips, activations), activations)
    return _Linear.apply(quantized, layer.bias, x.detach(), *layer[:-1], *arguments)


def feed_forward(
    x: Tensor, up: LayerTensors, down: LayerTensors, arguments: Arguments, activations: QuantArgs | None
) -> Tensor:
    """quantized_feed_forward with a gradient for x and both biases."""
    hidden = F.gelu(linear(x, up, arguments, activations), approximate="tanh")
    return linear(hidden, down, arguments, activations)


class _Linear(torch.autograd.Function):
    """The op's own output for x, and the gradient of a product with the quantized x, whose values are not needed."""

    @staticmethod
    def forward(ctx: Any, quantized: Tensor, bias: Tensor | None, x: Tensor, *rest: Any) -> Tensor:
        weight, weight_scale, weight_zero_point, weight_row_sum, clip_lower, clip_upper, *arguments = rest
        ctx.save_for_backward(weight, weight_scale, weight_zero_point, weight_row_sum)
        ctx.dtypes = quantized.dtype, None if bias is None else bias.dtype
        ctx.in_features, ctx.weight_bits, ctx.backend = x.shape[-1], arguments[1], arguments[4]
        clips = clip_lower, clip_upper
        tensors = weight, weight_scale, weight_zero_point, weight_row_sum, *clips, None if bias is None else bias.detach()
        return quantized_linear(x, *tensors, *arguments, False, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, weight_scale, weight_zero_point, weight_row_sum = ctx.saved_tensors
        input_dtype, bias_dtype = ctx.dtypes
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grid = weight_scale, weight_zero_point, weight_row_sum
            dense = dequantized_weight(weight, *grid, ctx.in_features, ctx.weight_bits, ctx.backend)
            grad_input = (grad.float() @ dense).to(input_dtype)
        if bias_dtype is not None and ctx.needs_input_grad[1]:
            grad_bias = grad.float().flatten(0, -2).sum(0).to(bias_dtype)
        return grad_input, grad_bias, *[None] * 12
