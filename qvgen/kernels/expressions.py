"""The PyTorch expressions that define the ops between linear layers (block_ops.py), in float32, differentiable."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qvgen.quant.primitives import quantized, range_to_grid
from qvgen.quant.scheme import QuantArgs

KEYS_TOGETHER = 64  # tokens of k that share a scale in attention_int8
_EIGHT_BITS = QuantArgs(num_bits=8, symmetric=True, strategy="token")


def layer_norm_modulate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    y = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale.float())
    if shift is not None:
        y = y + shift.float()
    return y.to(x.dtype)


def rms_norm_rotary(
    x: Tensor, weight: Tensor | None, cosine: Tensor | None, sine: Tensor | None, heads: int, eps: float
) -> Tensor:
    y = F.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps)
    if cosine is not None and sine is not None:
        even, odd = y.unflatten(-1, (heads, -1, 2)).unbind(-1)
        cos, sin = cosine.float()[..., 0::2], sine.float()[..., 1::2]
        y = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-3)
    return y.to(x.dtype)


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return (x.float() + (y.float() if gate is None else y.float() * gate.float())).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return y.transpose(1, 2).contiguous()


def attention_int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens, k = k.shape[1], k.float()
    k = F.pad(k - k.mean(1, keepdim=True), (0, 0, 0, 0, 0, -tokens % KEYS_TOGETHER))
    k = _eight_bits(k.unflatten(1, (-1, KEYS_TOGETHER)), (2, 4)).flatten(1, 2)[:, :tokens]
    return attention(_eight_bits(q.float(), (3,)), k, v.float()).to(q.dtype)


def _eight_bits(x: Tensor, together: tuple[int, ...]) -> Tensor:
    """x as its quantized values, with a scale for all that lie along the dimensions `together`."""
    largest = x.abs().amax(together, keepdim=True)
    return quantized(x, *range_to_grid(-largest, largest, _EIGHT_BITS), _EIGHT_BITS, torch.float32)


EXPRESSIONS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (layer_norm_modulate, rms_norm_rotary, add_gated, attention, attention_int8)
}
