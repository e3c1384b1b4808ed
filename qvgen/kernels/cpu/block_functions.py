"""The compiled versions of kernels/block_ops.py: pointers and shapes for libqvgen_cpu. Shapes as documented there, and
checked there."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qvgen.kernels.cpu import library
from qvgen.kernels.cpu.choice import PYTORCH, choice
from qvgen.kernels.cpu.descriptions import DTYPES, pointer
from qvgen.kernels.registry import BlockOp, KernelPreference, preference

VECTOR = 16  # elements; rotary embedding wants heads of whole vectors
# Up to these one kernel in float32, made for few keys, is faster than any other and than PyTorch's (python -m bench.choice).
SHORT_KEYS, SHORT_FEATURES = {torch.float32: 512, torch.bfloat16: 48}, 256  # 512 and 256 as in csrc/isa/isa.h
SHORT_SCORES = 64 * 64  # in bfloat16: queries times keys


def attention_refusal() -> str:
    """Why the compiled attention does not run on this machine, worded for a user; empty if it does."""
    if reason := library.refusal():
        return reason
    if not choice().compiled_attention:
        return "its instructions, AVX512_BF16 or AMX, are not in this machine or not in this build"
    if not attention_kernel():
        measured = choice()
        ours, pytorch = measured.attention_ms[measured.compiled_attention], measured.attention_ms[PYTORCH]
        return f"slower on this processor than PyTorch's: {ours:.2f} ms against {pytorch:.2f} (measured)"
    return ""


def attention_kernel() -> str:
    """The compiled attention that runs: on processors where PyTorch's is faster, only if asked for. Empty: none."""
    measured = choice()
    if preference() == KernelPreference.CPU:
        return measured.compiled_attention
    return "" if measured.attention == PYTORCH else measured.attention


def layer_norm_modulate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    x = x.contiguous()
    out, features = torch.empty_like(x), x.shape[-1]
    parameters = [_float(t) for t in (weight, bias, scale, shift)]
    library.check(
        library.load().qvgen_layer_norm(
            library.isa(),
            x.data_ptr(),
            DTYPES[x.dtype],
            x.numel() // features,
            features,
            eps,
            *[pointer(t) for t in parameters],
            _rows_per_group(x, scale if scale is not None else shift),
            out.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return out


def rms_norm_rotary(
    x: Tensor, weight: Tensor | None, cosine: Tensor | None, sine: Tensor | None, heads: int, eps: float
) -> Tensor:
    x = x.contiguous()
    out, features = torch.empty_like(x), x.shape[-1]
    parameters = [_float(t) for t in (weight, cosine, sine)]
    library.check(
        library.load().qvgen_rms_norm(
            library.isa(),
            x.data_ptr(),
            DTYPES[x.dtype],
            x.numel() // features,
            features,
            eps,
            *[pointer(t) for t in parameters],
            x.shape[-2],
            features // heads,
            out.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return out


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    x, y, gate = x.contiguous(), y.contiguous(), _float(gate)
    out, features = torch.empty_like(x), x.shape[-1]
    library.check(
        library.load().qvgen_add_gated(
            library.isa(),
            x.data_ptr(),
            y.data_ptr(),
            pointer(gate),
            DTYPES[x.dtype],
            x.numel() // features,
            features,
            _rows_per_group(x, gate),
            out.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return out


def attention_limits() -> str:
    """What of attention is left to PyTorch, and why; empty: nothing that is in bfloat16."""
    reason = attention_refusal()
    return f"short sequences only: {reason}" if reason else ""


def is_short(dtype: torch.dtype, queries: int, keys: int, features: int) -> bool:
    """Whether attention of heads of `features` runs in the kernel for short sequences."""
    if not 1 <= keys <= SHORT_KEYS.get(dtype, 0) or features % VECTOR or not 0 < features <= SHORT_FEATURES:
        return False
    return dtype == torch.float32 or queries * keys <= SHORT_SCORES


def attention_supported(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if is_short(q.dtype, q.shape[1], k.shape[1], q.shape[3]):
        return k.dtype == v.dtype == q.dtype
    bfloat16 = q.dtype == k.dtype == v.dtype == torch.bfloat16
    if not bfloat16 or not k.shape[1] or not (kernel := attention_kernel()):
        return False
    return bool(library.load().qvgen_attention_supported(kernel.encode(), q.shape[-1]))


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: str = "") -> Tensor:
    """`kernel`: one of library.attention_kernels; by default that for short sequences, or the one chosen."""
    if not kernel and is_short(q.dtype, q.shape[1], k.shape[1], q.shape[3]):
        return short_attention(q, k, v)
    return _attention(library.load().qvgen_attention, [(kernel or attention_kernel()).encode()], q, k, v)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In the kernel for short sequences, also where another is faster; up to 512 keys."""
    return _attention(library.load().qvgen_short_attention, [library.isa(), DTYPES[q.dtype]], q, k, v)


def _attention(function: Callable[..., int], how: list[object], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    samples, queries, heads, features = q.shape
    sizes = samples, queries, k.shape[1], heads, features, 1 / math.sqrt(features)
    pointers = q.data_ptr(), k.data_ptr(), v.data_ptr()
    library.check(function(*how, *pointers, *sizes, out.data_ptr(), torch.get_num_threads()))
    return out


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _rows_per_group(x: Tensor, modulation: Tensor | None) -> int:
    """Consecutive rows of x (n, s, d) that share a row of `modulation` (n, 1, d) or (n, s, d)."""
    if modulation is None:
        return 1
    return max(1, x.numel() // modulation.numel())


def _takes_rows(x: Tensor, *_: object) -> bool:
    return x.dtype in DTYPES


def _takes_rotary(x: Tensor, weight: object, cosine: Tensor | None, sine: object, heads: int, eps: float) -> bool:
    return x.dtype in DTYPES and (cosine is None or x.shape[-1] // heads % VECTOR == 0)


def _takes_sum(x: Tensor, y: Tensor, gate: Tensor | None) -> bool:
    return x.dtype in DTYPES and y.dtype == x.dtype


BLOCK_OPS = {
    "layer_norm_modulate": BlockOp(layer_norm_modulate, library.refusal, _takes_rows),
    "rms_norm_rotary": BlockOp(rms_norm_rotary, library.refusal, _takes_rotary),
    "add_gated": BlockOp(add_gated, library.refusal, _takes_sum),
    "attention": BlockOp(attention, library.refusal, attention_supported, attention_limits),
}
