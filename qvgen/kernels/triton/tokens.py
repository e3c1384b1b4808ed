"""Inputs to codes: each token's range, clipped, its grid and its codes, from one read of x, normalized where asked for, for
up to three layers.

Codes, scales and zero points are those of qvgen/quant/primitives.py bit for bit: division is IEEE division, rounding half to
even, and no product is fused with a sum (compile with enable_fp_fusion=False).
"""
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# A kernel's launch takes num_warps and the like, and its language is Triton's, neither of which pyright can know.

import triton
import triton.language as tl

from qvgen.kernels.triton.arithmetic import INFINITY, clamp, round_half_to_even
from qvgen.kernels.triton.rows import layer_norm_row


@triton.jit
def quantize_tokens_kernel(
    x_ptr,
    timestep_group_ptr,
    lower_0,
    upper_0,
    codes_0,
    scale_0,
    zero_point_0,
    sum_0,
    lower_1,
    upper_1,
    codes_1,
    scale_1,
    zero_point_1,
    sum_1,
    lower_2,
    upper_2,
    codes_2,
    scale_2,
    zero_point_2,
    sum_2,
    clips_0,
    clips_1,
    clips_2,
    weight_ptr,
    bias_ptr,
    modulation_scale_ptr,
    modulation_shift_ptr,
    x_stride,
    first,
    tokens_per_group,
    tokens,
    eps,
    CODES_STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SETS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """One program per token; the whole row is in registers, as (BLOCK_G, BLOCK_K) >= (GROUPS, GROUP_SIZE).

    x                (M, K) float32, bfloat16 or float16, rows x_stride apart, K = GROUPS GROUP_SIZE; with NORM the codes are
                     of its layer norm, modulated (rows.py) and rounded to the dtype of x
    weight, bias, modulation_scale, modulation_shift, tokens, eps    of the norm, as layer_norm_modulate_kernel has them
    timestep_group   int64, one for every tokens_per_group tokens, the first row being token number `first`
    for each of SETS layers:
    lower, upper     (clips,) float32
    codes            (M, CODES_STRIDE) int8 or e4m3: code - 2^(BITS - 1)
    scale            (M,) float32; NaN for a token that holds NaN or Inf, or whose timestep group has no clips
    zero_point       (M,) int32: zero point - 2^(BITS - 1)
    sum              (M, GROUPS) int32, of the codes as written
    """
    row = tl.program_id(0).to(tl.int64)
    g, j = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_K)[None, :]
    inside = (g < GROUPS) & (j < GROUP_SIZE)
    k = g * GROUP_SIZE + j
    x = tl.load(x_ptr + row * x_stride + k, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        x = layer_norm_row(
            x, k, inside, row, weight_ptr, bias_ptr, modulation_scale_ptr, modulation_shift_ptr, tokens, eps,
            GROUPS * GROUP_SIZE, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT, PER_TOKEN,
        )  # fmt: skip
        x = tl.where(inside, x.to(x_ptr.dtype.element_ty).to(tl.float32), 0.0)
    # Zero belongs to the range, so what lies outside the row changes nothing. These two ignore NaN.
    lower, upper = tl.min(tl.min(x, 1), 0), tl.max(tl.max(x, 1), 0)
    lower, upper = tl.minimum(lower, 0.0), tl.maximum(upper, 0.0)
    has_nan = tl.max(tl.max((x != x).to(tl.int32), 1), 0) > 0
    group = tl.load(timestep_group_ptr + (first + row) // tokens_per_group)
    _quantize(
        x, k, inside, row, lower, upper, has_nan, group, clips_0, lower_0, upper_0, codes_0, scale_0, zero_point_0, sum_0,
        CODES_STRIDE, GROUPS, BLOCK_G, BITS, SYMMETRIC,
    )  # fmt: skip
    if SETS > 1:
        _quantize(
            x, k, inside, row, lower, upper, has_nan, group, clips_1, lower_1, upper_1, codes_1, scale_1, zero_point_1, sum_1,
            CODES_STRIDE, GROUPS, BLOCK_G, BITS, SYMMETRIC,
        )  # fmt: skip
    if SETS > 2:
        _quantize(
            x, k, inside, row, lower, upper, has_nan, group, clips_2, lower_2, upper_2, codes_2, scale_2, zero_point_2, sum_2,
            CODES_STRIDE, GROUPS, BLOCK_G, BITS, SYMMETRIC,
        )  # fmt: skip


@triton.jit
def _quantize(
    x,
    k,
    inside,
    row,
    lower,
    upper,
    has_nan,
    group,
    clips,
    lower_ptr,
    upper_ptr,
    codes_ptr,
    scale_ptr,
    zero_point_ptr,
    sum_ptr,
    CODES_STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """One layer's codes of the row x; see quantize_tokens_kernel."""
    CENTRE: tl.constexpr = 2 ** (BITS - 1)
    LARGEST: tl.constexpr = 2**BITS - 1
    known = (group >= 0) & (group < clips)
    lower = tl.load(lower_ptr + group, mask=known, other=1.0) * lower
    upper = tl.load(upper_ptr + group, mask=known, other=1.0) * upper
    if SYMMETRIC:
        width = tl.div_rn(tl.maximum(-lower, upper, propagate_nan=tl.PropagateNan.ALL), CENTRE - 1.0)
    else:
        width = tl.div_rn(upper - lower, LARGEST * 1.0)
    scale = tl.where(width == 0, 1.0, width)
    finite = (scale == scale) & (tl.abs(scale) != INFINITY) & known & (has_nan == 0)
    safe = tl.where(finite, scale, 1.0)
    if SYMMETRIC:
        zero_point = CENTRE * 1.0
    else:
        zero_point = round_half_to_even(clamp(tl.div_rn(tl.where(finite, -lower, 0.0), safe), 0.0, LARGEST * 1.0))
    # round(x / s) + z, clamped, for a whole z: clamped first, because only small numbers can be rounded by an addition.
    values = tl.where(finite, x, 0.0)
    quotient = tl.div_rn(values, tl.broadcast_to(safe, values.shape))
    codes = round_half_to_even(clamp(quotient, -zero_point, LARGEST - zero_point)) + (zero_point - CENTRE)
    tl.store(codes_ptr + row * CODES_STRIDE + k, codes.to(codes_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")))  # no global: Triton compares those, and NaN is not NaN
    tl.store(zero_point_ptr + row, (zero_point - CENTRE).to(tl.int32))
    g = tl.arange(0, BLOCK_G)
    sums = tl.sum(tl.where(inside, codes, 0.0).to(tl.int32), 1)
    tl.store(sum_ptr + row * GROUPS + g, sums, mask=g < GROUPS)
