"""The ops between linear layers (block_ops.py): one program per token, the row in registers, float32 from load to store."""
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# A kernel's launch takes num_warps and the like, and its language is Triton's, neither of which pyright can know.

import triton
import triton.language as tl


@triton.jit
def modulation_row(row, tokens, PER_TOKEN: tl.constexpr):
    """Row of a modulation for a row of x: its own, or that of its sample of `tokens` rows."""
    return row if PER_TOKEN else row // tokens


@triton.jit
def layer_norm_row(
    x,
    i,
    inside,
    row,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    tokens,
    eps,
    D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """A row x of D features, at i where `inside`, zero elsewhere, in a block of any shape; float32. The rest as
    layer_norm_modulate_kernel has it."""
    centred = tl.where(inside, x - tl.div_rn(tl.sum(x), D * 1.0), 0.0)
    y = centred * tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(centred * centred), D * 1.0) + eps))
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + i, mask=inside, other=0.0).to(tl.float32)
    at = modulation_row(row, tokens, PER_TOKEN) * D + i
    if HAS_SCALE:
        y *= 1.0 + tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        y += tl.load(shift_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def layer_norm_modulate_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    tokens,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """x, y (M, D) any float, contiguous; weight, bias (D,); scale, shift (M / tokens, D), or (M, D) with PER_TOKEN. The sums
    round in another order than torch's."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < D
    x = tl.load(x_ptr + row * D + i, mask=inside, other=0.0).to(tl.float32)
    y = layer_norm_row(
        x, i, inside, row, weight_ptr, bias_ptr, scale_ptr, shift_ptr, tokens, eps,
        D, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT, PER_TOKEN,
    )  # fmt: skip
    tl.store(y_ptr + row * D + i, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_rotary_kernel(
    x_ptr,
    weight_ptr,
    cosine_ptr,
    sine_ptr,
    y_ptr,
    tokens,
    eps,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """x, y (M, D) any float, contiguous, M a multiple of `tokens`; weight (D,); cosine, sine (tokens, HEAD), of which the even
    and the odd columns are read. BLOCK >= D / 2 pairs. The sum rounds in another order than torch's."""
    row = tl.program_id(0).to(tl.int64)
    pair, side = tl.arange(0, BLOCK)[:, None], tl.arange(0, 2)[None, :]
    i = 2 * pair + side
    inside = i < D
    x = tl.load(x_ptr + row * D + i, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(x * x, 1), 0) / D
    y = x * (1.0 / tl.sqrt_rn(mean + eps))
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    if ROTARY:
        pairs = tl.arange(0, BLOCK)
        at = (row % tokens) * HEAD + (2 * pairs) % HEAD
        cosine = tl.load(cosine_ptr + at, mask=2 * pairs < D, other=0.0).to(tl.float32)
        sine = tl.load(sine_ptr + at + 1, mask=2 * pairs < D, other=0.0).to(tl.float32)
        even, odd = tl.split(y)
        y = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    tl.store(y_ptr + row * D + i, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_gated_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    out_ptr,
    tokens,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """out = x + y gate; x, y, out (M, D) any float, contiguous; gate (M / tokens, D), or (M, D) with PER_TOKEN. Compiled
    without fusing the product with the sum it is torch's result bit for bit."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < D
    y = tl.load(y_ptr + row * D + i, mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        at = modulation_row(row, tokens, PER_TOKEN) * D + i
        y *= tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(x_ptr + row * D + i, mask=inside, other=0.0).to(tl.float32) + y
    tl.store(out_ptr + row * D + i, out.to(out_ptr.dtype.element_ty), mask=inside)
