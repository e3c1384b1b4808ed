"""Arithmetic that Triton's kernels share. Each function says what is exact: `/` in Triton is an approximation."""
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# A kernel's launch takes num_warps and the like, and its language is Triton's, neither of which pyright can know.

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
_ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it keeps no fraction
_GELU = tl.constexpr(2 * 0.7978845608028654)  # 2 sqrt(2 / pi)


@triton.jit
def round_half_to_even(x):
    """x float32 of absolute value below 2^22, exact. There is no such instruction in the interpreter, and none is needed."""
    return (x + _ROUNDING) - _ROUNDING


@triton.jit
def clamp(x, lower, upper):
    """NaN stays NaN, as in torch.clamp."""
    x = tl.maximum(x, lower, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, upper, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gelu(x):
    """The tanh form, float32, by x sigmoid(2u), which is the same as 0.5 x (1 + tanh(u)); rounds otherwise than torch."""
    u = _GELU * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-u))
