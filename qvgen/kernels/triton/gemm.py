"""The products of packed layers, integer and weight-only, with what follows in one pass over the outputs."""
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# A kernel's launch takes num_warps and the like, and its language is Triton's, neither of which pyright can know.

import triton
import triton.language as tl

from qvgen.kernels.triton.arithmetic import gelu
from qvgen.kernels.triton.planes import load_bytes, plane
from qvgen.kernels.triton.rows import modulation_row


@triton.jit
def integer_gemm_kernel(
    a_ptr,
    a_scale_ptr,
    a_zero_point_ptr,
    a_sum_ptr,
    w_ptr,
    w_scale_ptr,
    w_zero_point_ptr,
    w_sum_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    y_ptr,
    M,
    N,
    tokens,
    A_STRIDE: tl.constexpr,
    W_STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    STORED_BITS: tl.constexpr,
    PLANES: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    E4M3: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    """y = s_a sum_g s_w [sum (q_a - z_a) q_w - z_w sum (q_a - z_a)] + bias, one program per BLOCK_M x BLOCK_N outputs.

    a                 (M, A_STRIDE) int8, codes less 2^(bits - 1); with E4M3 the bits of these as e4m3, exact up to 4 bits
    a_scale, a_zero_point, a_sum    (M,) float32, (M,) int32, (M, GROUPS) int32, as quantize_tokens_kernel writes them
    w                 STORED_BITS 2, 3, 4: bit planes (layout.py), unpacked in the loop, GROUPS = 1;
                      8: (N, W_STRIDE) codes less 2^(WEIGHT_BITS - 1), as those of a
    w_scale, w_zero_point, w_sum    (N, GROUPS) float32, float32, int32; the sums are of codes from 0
    bias              (N,) any float
    residual, gate    with RESIDUAL, y = residual + y gate, y rounded before to the dtype of y: as add_gated_kernel has them
    y                 (M, N) float32, bfloat16 or float16

    Exact: both sums, in int32 for K up to 2^31 / (2^bits - 1)(2^weight bits - 1) (in e4m3: whole numbers below 2^24 in
    float32). Float32 begins with the conversion of the first sum, the order of roundings is that of the reference.
    """
    CENTRE: tl.constexpr = 2 ** (WEIGHT_BITS - 1)
    rows_of_tiles, columns_of_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # Tiles that run together share rows of a and columns of w in the cache.
    pid = tl.program_id(0)
    band = pid // (SWIZZLE * columns_of_tiles)
    height = min(rows_of_tiles - band * SWIZZLE, SWIZZLE)
    within = pid % (SWIZZLE * columns_of_tiles)
    m = (band * SWIZZLE + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    # What lies outside is computed from row 0, which is there, and not written.
    rows, columns = tl.where(m < M, m, 0).to(tl.int64), tl.where(n < N, n, 0).to(tl.int64)
    a_rows, w_columns = a_ptr + rows[:, None] * A_STRIDE, w_ptr + columns[None, :] * W_STRIDE
    j = tl.arange(0, BLOCK_K)
    a_zero_point = tl.load(a_zero_point_ptr + rows)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_type: tl.constexpr = tl.float32 if E4M3 else tl.int32
    if GROUPS == 1:
        products = tl.zeros((BLOCK_M, BLOCK_N), sum_type)
        for start in range(0, WIDTH, BLOCK_K):
            at = start + j
            first, second, third = load_bytes(w_columns, at[:, None], (at < WIDTH)[:, None], WIDTH, STORED_BITS)
            for p in tl.static_range(PLANES):
                k = p * WIDTH + at
                a = tl.load(a_rows + k[None, :], mask=((at < WIDTH) & (k < GROUP_SIZE))[None, :], other=0)
                w = plane(first, second, third, p, STORED_BITS)
                if E4M3:
                    a = a.to(tl.float8e4nv, bitcast=True)
                    w = w.to(tl.float8e4nv, bitcast=True) if STORED_BITS == 8 else w.to(tl.float32).to(tl.float8e4nv)
                products = tl.dot(a, w, products, out_dtype=sum_type)
        total = _corrected(
            products, a_zero_point, rows, columns, 0, a_sum_ptr, w_scale_ptr, w_zero_point_ptr, w_sum_ptr,
            GROUPS, GROUP_SIZE, CENTRE, ASYMMETRIC,
        )  # fmt: skip
    else:
        for g in range(GROUPS):
            products = tl.zeros((BLOCK_M, BLOCK_N), sum_type)
            for start in tl.static_range(0, GROUP_SIZE, BLOCK_K):
                at = start + j
                k = g * GROUP_SIZE + at
                a = tl.load(a_rows + k[None, :], mask=(at < GROUP_SIZE)[None, :], other=0)
                w = tl.load(w_columns + k[:, None], mask=(at < GROUP_SIZE)[:, None], other=0)
                if E4M3:
                    a, w = a.to(tl.float8e4nv, bitcast=True), w.to(tl.float8e4nv, bitcast=True)
                products = tl.dot(a, w, products, out_dtype=sum_type)
            total += _corrected(
                products, a_zero_point, rows, columns, g, a_sum_ptr, w_scale_ptr, w_zero_point_ptr, w_sum_ptr,
                GROUPS, GROUP_SIZE, CENTRE, ASYMMETRIC,
            )  # fmt: skip
    y = total * tl.load(a_scale_ptr + rows)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    if GELU:
        y = gelu(y)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if RESIDUAL:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        if HAS_GATE:
            gate_rows = modulation_row(m.to(tl.int64), tokens, PER_TOKEN)
            y *= tl.load(gate_ptr + (gate_rows[:, None] * N + n[None, :]), mask=inside, other=0.0).to(tl.float32)
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _corrected(
    products,
    a_zero_point,
    rows,
    columns,
    g,
    a_sum_ptr,
    w_scale_ptr,
    w_zero_point_ptr,
    w_sum_ptr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    CENTRE: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
):
    """s_w [sum (q_a - z_a) q_w - z_w sum (q_a - z_a)] of a group, (BLOCK_M, BLOCK_N) float32, from products of centred codes.

    With a' = q_a - c_a, z' = z_a - c_a and w' = q_w - c_w: sum (q_a - z_a) q_w = sum a' w' + c_w sum a' - z' sum q_w.
    """
    products = products.to(tl.int32)
    w_sum = tl.load(w_sum_ptr + columns * GROUPS + g)
    if ASYMMETRIC:
        a_sum = tl.load(a_sum_ptr + rows * GROUPS + g)
        integer = products + (CENTRE * a_sum)[:, None] - a_zero_point[:, None] * w_sum[None, :]
        centred_sum = (a_sum - GROUP_SIZE * a_zero_point).to(tl.float32)
        zero_point = tl.load(w_zero_point_ptr + columns * GROUPS + g)
        part = integer.to(tl.float32) - centred_sum[:, None] * zero_point[None, :]
    else:
        integer = products - a_zero_point[:, None] * (w_sum - CENTRE * GROUP_SIZE)[None, :]
        part = integer.to(tl.float32)
    return part * tl.load(w_scale_ptr + columns * GROUPS + g)[None, :]


@triton.jit
def weight_only_kernel(
    x_ptr,
    w_ptr,
    w_scale_ptr,
    w_zero_point_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    X_STRIDE: tl.constexpr,
    W_STRIDE: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    PLANES: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = s_w [sum x (q_w - c) - (z_w - c) sum x] + bias, c = 2^(WEIGHT_BITS - 1): one program per BLOCK_M x BLOCK_N outputs.

    x           (M, X_STRIDE) bfloat16 or float16, which hold q_w - c exactly
    w           bit planes (layout.py), unpacked in the loop; w_scale, w_zero_point (N,) float32; bias (N,) any float
    y           (M, N) any float

    Sums are float32; the weight itself is never rounded to x's dtype, as the reference rounds it.
    """
    CENTRE: tl.constexpr = 2 ** (WEIGHT_BITS - 1)
    tiles = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    # What lies outside is computed from row 0, which is there, and not written.
    rows, columns = tl.where(m < M, m, 0).to(tl.int64), tl.where(n < N, n, 0).to(tl.int64)
    x_rows, w_columns = x_ptr + rows[:, None] * X_STRIDE, w_ptr + columns[None, :] * W_STRIDE
    j = tl.arange(0, BLOCK_K)
    products, sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        at = start + j
        first, second, third = load_bytes(w_columns, at[:, None], (at < WIDTH)[:, None], WIDTH, WEIGHT_BITS)
        for p in tl.static_range(PLANES):
            k = p * WIDTH + at
            x = tl.load(x_rows + k[None, :], mask=((at < WIDTH) & (k < K))[None, :], other=0.0)
            w = plane(first, second, third, p, WEIGHT_BITS).to(x.dtype)
            products = tl.dot(x, w, products)
            if ASYMMETRIC:
                sums += tl.sum(x.to(tl.float32), 1)
    if ASYMMETRIC:
        zero_point = tl.load(w_zero_point_ptr + columns) - CENTRE
        products -= sums[:, None] * zero_point[None, :]
    y = products * tl.load(w_scale_ptr + columns)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    if GELU:
        y = gelu(y)
    out = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
