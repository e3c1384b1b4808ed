"""The ops between a transformer block's linear layers, each in float32 from one load to one store.

    layer_norm_modulate(x, weight, bias, scale, shift, eps)       layer norm, affine, then * (1 + scale) + shift
    rms_norm_rotary(x, weight, cosine, sine, heads, eps)          RMS norm over all heads, then rotary embedding
    add_gated(x, y, gate)                                         x + y * gate
    attention(q, k, v)                                            softmax(q k^T / sqrt(D)) v, all to all
    attention_int8(q, k, v)                                       the same of q, k less its mean over tokens, in 8 bits each

    x, y             (n, s, d) float32 or bfloat16, of any strides
    weight, bias     (d,)
    scale, shift, gate   (n, 1, d) for each sample or (n, s, d) for each token
    cosine, sine     (1, s, 1, D), d = heads * D: of each pair of features the cosine in the even, the sine in the odd place
                     (as diffusers' WanRotaryPosEmbed gives them)
    q                (n, s, heads, D); k and v (n, t, heads, D)
    result           as x, or as q, in its dtype

attention_int8 is what SageAttention does (arXiv 2410.02367): a mean that all keys share moves all scores of a query alike,
of which softmax takes no notice. Codes are from -127 to 127, with a scale for each token and head of q and for KEYS_TOGETHER
tokens of a head of k (expressions.py); sums of their products are exact.

PyTorch makes a pass over memory for each elementary operation, with conversions to float32 and back between. A backend that
has the op does it in one (registry.BlockOp); elsewhere the expressions of expressions.py run, which define the result.
The two differ by rounding: float32 sums in another order, and one rounding to x's dtype instead of one per step. Where a
gradient is asked for the expressions run, and autograd goes through them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qvgen.kernels import registry
from qvgen.kernels.checked import with_fake_input
from qvgen.kernels.direct import nobody_watches
from qvgen.kernels.expressions import EXPRESSIONS

OPS = registry.BLOCK_OPS
_library = torch.library.Library("qvgen", "FRAGMENT")


def _define(name: str, schema: str, check: Callable[..., None]) -> Callable[..., Tensor]:
    def implementation(*args: Any) -> Tensor:
        check(*args)
        return registry.block_op(name, args)(*args).contiguous()  # as the fake says: a compiled graph relies on strides

    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    fake = with_fake_input(lambda x, *_: x.new_empty(x.shape))
    torch.library.register_fake(f"qvgen::{name}", fake, lib=_library)
    op, expression = getattr(torch.ops.qvgen, name).default, EXPRESSIONS[name]

    def call(*args: Any) -> Tensor:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return expression(*args)
        if nobody_watches(args[0]):
            check(*args)
            return registry.block_op(name, args)(*args).contiguous()
        return op(*args)

    call.__name__, call.__doc__ = name, f"qvgen::{name}{schema}"
    return call


def check_layer_norm(x: Tensor, weight: Any, bias: Any, scale: Any, shift: Any, eps: float) -> None:
    _check_rows(x)
    _check_place(x, weight=weight, bias=bias, scale=scale, shift=shift)
    _check_features(x, weight=weight, bias=bias)
    _check_modulation(x, scale=scale, shift=shift)
    if scale is not None and shift is not None and scale.shape != shift.shape:
        raise ValueError(f"scale and shift must have one shape, not {tuple(scale.shape)} and {tuple(shift.shape)}")


def _check_rms_norm(x: Tensor, weight: Any, cosine: Any, sine: Any, heads: int, eps: float) -> None:
    _check_rows(x)
    _check_place(x, weight=weight, cosine=cosine, sine=sine)
    _check_features(x, weight=weight)
    if heads < 1 or x.shape[-1] % heads:
        raise ValueError(f"{x.shape[-1]} features are not {heads} heads of one size")
    if (cosine is None) != (sine is None):
        raise ValueError("cosine and sine belong together: give both or neither")
    expected = (1, x.shape[1], 1, x.shape[-1] // heads)
    for name, tensor in (("cosine", cosine), ("sine", sine)):
        if tensor is not None and (tensor.shape != expected or expected[-1] % 2 or not tensor.dtype.is_floating_point):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name} must be floating point of shape {expected}, with an even last size, not {found}")


def check_add_gated(x: Tensor, y: Tensor, gate: Any) -> None:
    _check_rows(x)
    if y is None or y.shape != x.shape or not y.dtype.is_floating_point:
        found = "missing" if y is None else f"{y.dtype} {tuple(y.shape)}"
        raise ValueError(f"y must be floating point of shape {tuple(x.shape)}, not {found}")
    _check_place(x, y=y, gate=gate)
    _check_modulation(x, gate=gate)


def _check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q is None or k is None or v is None:
        raise ValueError("attention needs q, k and v, and one is missing")
    _check_place(q, q=q, k=k, v=v)
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or not q.dtype == k.dtype == v.dtype:
        shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in (q, k, v))
        raise ValueError(f"q (n, s, heads, D), k and v (n, t, heads, D) must have one dtype, not {shapes}")
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]) or not q.dtype.is_floating_point:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in samples, heads and features")


def _check_rows(x: Tensor) -> None:
    if x is None or x.ndim != 3 or not x.dtype.is_floating_point or x.shape[-1] == 0 or x.layout != torch.strided:
        found = "missing" if x is None else f"{x.dtype} {tuple(x.shape)}"
        raise ValueError(f"x must be dense, floating point and of shape (n, s, d), d > 0, not {found}")


def _check_place(x: Tensor, **tensors: Tensor | None) -> None:
    """Compiled code reads what is dense and in this machine's memory."""
    device = x.device
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.device != device or tensor.layout != torch.strided):
            raise ValueError(f"{name} must be a dense tensor on {device}, not {tensor.layout} on {tensor.device}")


def _check_features(x: Tensor, **parameters: Tensor | None) -> None:
    for name, tensor in parameters.items():
        if tensor is not None and (tensor.shape != x.shape[-1:] or not tensor.dtype.is_floating_point):
            raise ValueError(f"{name} must be floating point of shape {tuple(x.shape[-1:])}, not {tuple(tensor.shape)}")


def _check_modulation(x: Tensor, **tensors: Tensor | None) -> None:
    n, s, d = x.shape
    for name, tensor in tensors.items():
        if tensor is not None and (tuple(tensor.shape) not in ((n, 1, d), (n, s, d)) or not tensor.dtype.is_floating_point):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name} must be floating point of shape {(n, 1, d)} or {(n, s, d)}, not {found}")


layer_norm_modulate = _define(
    "layer_norm_modulate",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps) -> Tensor",
    check_layer_norm,
)
rms_norm_rotary = _define(
    "rms_norm_rotary",
    "(Tensor x, Tensor? weight, Tensor? cosine, Tensor? sine, int heads, float eps) -> Tensor",
    _check_rms_norm,
)
add_gated = _define("add_gated", "(Tensor x, Tensor y, Tensor? gate) -> Tensor", check_add_gated)
attention = _define("attention", "(Tensor q, Tensor k, Tensor v) -> Tensor", _check_attention)
attention_int8 = _define("attention_int8", "(Tensor q, Tensor k, Tensor v) -> Tensor", _check_attention)
