"""Fake quantization (qvgen/quant/primitives.py) of rows that have a grid each: one program per row, the row in registers.

Codes are those of primitives.py bit for bit: division is IEEE division, rounding half to even, and no product is fused with a
sum (compile with enable_fp_fusion=False).
"""
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# A kernel's launch takes num_warps and the like, and its language is Triton's, neither of which pyright can know.

import triton
import triton.language as tl

from qvgen.kernels.triton.arithmetic import clamp, round_half_to_even


@triton.jit
def _unclamped(x, scale, zero_point, LARGEST: tl.constexpr, FLOAT_ZERO_POINT: tl.constexpr):
    """The code before it is clamped, exact from -1 to LARGEST + 1; what lies beyond is brought to these, because only small
    numbers can be rounded by an addition."""
    quotient = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    if FLOAT_ZERO_POINT:
        return round_half_to_even(clamp(quotient + zero_point, -1.0, LARGEST + 1.0))
    return round_half_to_even(clamp(quotient, -1.0 - zero_point, LARGEST + 1.0 - zero_point)) + zero_point


@triton.jit
def fake_quantize_kernel(
    x_ptr,
    scale_ptr,
    zero_point_ptr,
    y_ptr,
    K,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    FLOAT_ZERO_POINT: tl.constexpr,
):
    """y = s (q - z); x, y (M, K) any float, contiguous; scale, zero_point (M,) float32."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < K
    x = tl.load(x_ptr + row * K + i, mask=inside, other=0.0).to(tl.float32)
    scale, zero_point = tl.load(scale_ptr + row), tl.load(zero_point_ptr + row)
    code = clamp(_unclamped(x, scale, zero_point, LARGEST, FLOAT_ZERO_POINT), 0.0, LARGEST * 1.0)
    tl.store(y_ptr + row * K + i, (scale * (code - zero_point)).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def fake_quantize_backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    zero_point_ptr,
    grad_x_ptr,
    grad_scale_ptr,
    grad_zero_point_ptr,
    K,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    FLOAT_ZERO_POINT: tl.constexpr,
):
    """The gradients of _FakeQuantize. grad, x, grad_x (M, K) any float, contiguous, grad_x exact; the rest (M,) float32, whose
    sums round in another order than torch's."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < K
    x = tl.load(x_ptr + row * K + i, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * K + i, mask=inside, other=0.0).to(tl.float32)
    scale, zero_point = tl.load(scale_ptr + row), tl.load(zero_point_ptr + row)
    code = _unclamped(x, scale, zero_point, LARGEST, FLOAT_ZERO_POINT)
    grad_x = tl.where((code >= 0.0) & (code <= LARGEST), grad, 0.0)
    quantized = scale * (clamp(code, 0.0, LARGEST * 1.0) - zero_point)
    # Outside the row both gradients are 0, but a NaN scale makes what they are multiplied with NaN.
    by_scale = tl.sum(tl.where(inside, grad * quantized - grad_x * x, 0.0), 0)
    tl.store(grad_x_ptr + row * K + i, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_scale_ptr + row, tl.div_rn(by_scale, scale))
    tl.store(grad_zero_point_ptr + row, scale * tl.sum(grad_x - grad, 0))
