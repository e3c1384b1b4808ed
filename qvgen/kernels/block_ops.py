"""What a transformer block computes between its linear layers, each as one op: in float32 from one load to one store.

    qvgen::layer_norm_modulate(x, weight, bias, scale, shift)    layer norm, affine, then * (1 + scale) + shift
    qvgen::rms_norm_rotary(x, weight, cosine, sine)              RMS norm over all heads, then rotary embedding
    qvgen::add_gated(x, y, gate)                                 x + y * gate
    qvgen::attention(q, k, v)                                    softmax(q k^T / sqrt(D)) v, all to all

PyTorch makes a pass over memory for each elementary operation, with conversions to float32 and back between. On the CPU the
compiled kernels do this; everywhere else, and with QVGEN_KERNELS=reference, the PyTorch expressions below, which define the
result. The two differ by rounding: float32 sums in another order, and one rounding to x's dtype instead of one per step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qvgen.kernels.cpu import block_functions as compiled
from qvgen.kernels.registry import ENVIRONMENT, KernelPreference, KernelRow, preference

OPS = ("layer_norm_modulate", "rms_norm_rotary", "add_gated", "attention")


def _layer_norm_modulate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    if _compiled(x):
        return compiled.layer_norm_modulate(x, weight, bias, scale, shift, eps)
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    y = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale.float())
    if shift is not None:
        y = y + shift.float()
    return y.to(x.dtype)


def _rms_norm_rotary(
    x: Tensor, weight: Tensor | None, cosine: Tensor | None, sine: Tensor | None, heads: int, eps: float
) -> Tensor:
    if _compiled(x) and (cosine is None or x.shape[-1] // heads % compiled.VECTOR == 0):
        return compiled.rms_norm_rotary(x, weight, cosine, sine, heads, eps)
    y = F.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps)
    if cosine is not None and sine is not None:
        even, odd = y.unflatten(-1, (heads, -1, 2)).unbind(-1)
        cos, sin = cosine.float()[..., 0::2], sine.float()[..., 1::2]
        y = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-3)
    return y.to(x.dtype)


def _add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    if _compiled(x) and y.dtype == x.dtype:
        return compiled.add_gated(x, y, gate)
    return (x.float() + (y.float() if gate is None else y.float() * gate.float())).to(x.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if _compiled(q) and compiled.attention_supported(q, k, v):
        return compiled.attention(q, k, v)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return y.transpose(1, 2).contiguous()


def _compiled(x: Tensor) -> bool:
    wanted = preference()
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or wanted == KernelPreference.REFERENCE:
        return False
    if compiled.available():
        return True
    if wanted == KernelPreference.CPU:
        raise RuntimeError(f"{ENVIRONMENT}=cpu asks for compiled kernels, which cannot run: {compiled.refusal(OPS[0])}")
    return False


def explain(device: torch.device | str = "cpu") -> list[KernelRow]:
    """Each of OPS, compiled and in PyTorch, and which one tensors on `device` get (unless dtype or shape rule it out)."""
    device, forced = torch.device(device), preference() == KernelPreference.REFERENCE
    rows = []
    for op in OPS:
        missing = compiled.refusal(op)
        reason = missing or ("" if device.type == "cpu" else f"runs on cpu only, not on {device.type}")
        used = not reason and not forced
        rows += [KernelRow(op, "cpu", not missing, reason, used), KernelRow(op, "reference", True, "", not used)]
    return rows


_library = torch.library.Library("qvgen", "FRAGMENT")


def _define(name: str, schema: str, implementation: Callable[..., Any]) -> Any:
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qvgen::{name}", lambda x, *_: x.new_empty(x.shape), lib=_library)
    return getattr(torch.ops.qvgen, name).default


layer_norm_modulate = _define(
    "layer_norm_modulate",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps) -> Tensor",
    _layer_norm_modulate,
)
"""x (n, s, d); weight, bias (d,); scale, shift (n, 1, d) for each sample or (n, s, d) for each token. Returns (n, s, d)."""

rms_norm_rotary = _define(
    "rms_norm_rotary",
    "(Tensor x, Tensor? weight, Tensor? cosine, Tensor? sine, int heads, float eps) -> Tensor",
    _rms_norm_rotary,
)
"""x (n, s, heads * D); cosine, sine (1, s, 1, D), of each pair of features the cosine in the even, the sine in the odd place
(as diffusers' WanRotaryPosEmbed gives them). Returns (n, s, heads * D)."""

add_gated = _define("add_gated", "(Tensor x, Tensor y, Tensor? gate) -> Tensor", _add_gated)
"""x, y (n, s, d); gate (n, 1, d) or (n, s, d). Returns (n, s, d)."""

attention = _define("attention", "(Tensor q, Tensor k, Tensor v) -> Tensor", _attention)
"""q (n, s, heads, D), k and v (n, t, heads, D). Returns (n, s, heads, D)."""
