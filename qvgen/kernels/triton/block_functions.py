"""The GPU versions of kernels/block_ops.py. Shapes as documented there, and checked there. Attention is PyTorch's, but
for that with scores of codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qvgen.kernels.registry import BlockOp
from qvgen.kernels.triton.attention import launch as attention

MOST_FEATURES = 2**15  # of a row, which a program keeps in registers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer_norm_modulate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    from qvgen.kernels.triton.rows import layer_norm_modulate_kernel

    x = x.contiguous()
    modulation = scale if scale is not None else shift
    return _launch(
        layer_norm_modulate_kernel, x, [weight, bias, scale, shift], _block(x.shape[-1]), [x.shape[1], eps],
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_SCALE=scale is not None, HAS_SHIFT=shift is not None,
        PER_TOKEN=modulation is not None and modulation.shape[1] == x.shape[1],
    )  # fmt: skip


def rms_norm_rotary(
    x: Tensor, weight: Tensor | None, cosine: Tensor | None, sine: Tensor | None, heads: int, eps: float
) -> Tensor:
    from qvgen.kernels.triton.rows import rms_norm_rotary_kernel

    x = x.contiguous()
    pairs = _block(-(-x.shape[-1] // 2))
    return _launch(
        rms_norm_rotary_kernel, x, [weight, cosine, sine], pairs, [x.shape[1], eps],
        HEAD=x.shape[-1] // heads, HAS_WEIGHT=weight is not None, ROTARY=cosine is not None,
    )  # fmt: skip


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    from qvgen.kernels.triton.rows import add_gated_kernel

    x = x.contiguous()
    per_token = gate is not None and gate.shape[1] == x.shape[1]
    return _launch(
        add_gated_kernel, x, [y, gate], _block(x.shape[-1]), [x.shape[1]], HAS_GATE=gate is not None, PER_TOKEN=per_token
    )


def _launch(
    kernel: object, x: Tensor, others: list[Tensor | None], block: int, numbers: list[float], **constants: object
) -> Tensor:
    """Run a kernel of rows.py with x, its other tensors (x for those that are absent), its result, numbers and constants."""
    from qvgen.kernels.triton.configurations import row_warps
    from qvgen.kernels.triton.launch import on

    out = torch.empty_like(x)
    if not x.numel():
        return out
    for tensor in others:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device} and another argument on {tensor.device}: move one to the other's device")
    tensors = [x if tensor is None else tensor.contiguous() for tensor in others]
    with on(x.device):
        kernel[(x.numel() // x.shape[-1],)](  # type: ignore[index]
            x, *tensors, out, *numbers, D=x.shape[-1], BLOCK=block, **constants,
            num_warps=row_warps(block), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _block(features: int) -> int:
    return 1 << max(0, features - 1).bit_length()


def _takes(x: Tensor, *others: object) -> bool:
    tensors = [x, *[t for t in others if isinstance(t, Tensor)]]
    return all(t.dtype in DTYPES for t in tensors) and x.shape[-1] <= MOST_FEATURES


def _missing() -> str:
    from qvgen.kernels.triton.backend import refusal  # which imports this module

    return refusal()


_RUN: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (layer_norm_modulate, rms_norm_rotary, add_gated)}
BLOCK_OPS = {name: BlockOp(run, _missing, _takes) for name, run in _RUN.items()} | {
    "attention_int8": BlockOp(attention.attention_int8, _missing, attention.takes)
}
