"""Codes of q and k, and the attention that multiplies them: blocks of queries over blocks of keys, scores never in memory."""
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# A kernel's launch takes num_warps and the like, and its language is Triton's, neither of which pyright can know.

import triton
import triton.language as tl

from qvgen.kernels.triton.arithmetic import round_half_to_even


@triton.jit
def eight_bits_kernel(
    x_ptr,
    mean_ptr,
    codes_ptr,
    scale_ptr,
    tokens,
    heads,
    x_sample,
    x_token,
    x_head,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """round((x - mean) / scale), scale = max |x - mean| / 127: one program for TOKENS tokens of a sample's head.

    x        (n, tokens, heads, D) float32, bfloat16 or float16; strides of all but the last
    mean     (n heads, D) float32, with KEYS
    codes    (n heads, tokens, BLOCK_D) int8, zero beyond D
    scale    (n heads, tokens) float32; with KEYS the TOKENS have one; NaN where one of the values is not finite
    """
    head, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    token, d = block * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK_D)
    inside = (token < tokens)[:, None] & (d < D)[None, :]
    x_ptr += head // heads * x_sample + head % heads * x_head
    x = tl.load(x_ptr + token.to(tl.int64)[:, None] * x_token + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if KEYS:
        x = tl.where(inside, x - tl.load(mean_ptr + head * D + d, mask=d < D, other=0.0)[None, :], 0.0)
    # The largest ignores NaN; 0 x is NaN for that and for Inf, and nothing for others.
    largest = tl.max(tl.abs(x), 1) + tl.sum(0.0 * x, 1)
    if KEYS:
        largest = tl.zeros((TOKENS,), tl.float32) + (tl.max(largest, 0) + tl.sum(0.0 * largest, 0))
    scale = tl.where(largest == 0, 1.0, tl.div_rn(largest, 127.0))
    tl.store(scale_ptr + head * tokens + token, scale, mask=token < tokens)
    codes = round_half_to_even(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)))
    at = (head * tokens + token)[:, None] * BLOCK_D + d[None, :]
    tl.store(codes_ptr + at, codes.to(tl.int8), mask=(token < tokens)[:, None])


@triton.jit
def attention_int8_kernel(
    q_ptr,
    q_scale_ptr,
    k_ptr,
    k_scale_ptr,
    v_ptr,
    y_ptr,
    scale,
    queries,
    keys,
    heads,
    v_sample,
    v_token,
    v_head,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """softmax(q k^T / sqrt(D)) v, one program for BLOCK_M queries of a sample's head.

    q, q_scale    (n heads, queries, BLOCK_D) int8, (n heads, queries) float32
    k, k_scale    (n heads, keys, BLOCK_D) int8, (n heads, keys) float32, the same for each BLOCK_N keys
    v             (n, keys, heads, D) bfloat16 or float16; strides of all but the last
    y             (n, queries, heads, D) any float, contiguous
    scale         log2(e) / sqrt(D)

    Sums of products of codes are exact in int32; probabilities are rounded to the dtype of v, their sums are float32.
    """
    head = tl.program_id(1).to(tl.int64)
    m, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    rows = head * queries + tl.where(m < queries, m, 0)  # what lies outside is that of query 0, and not written
    q = tl.load(q_ptr + rows[:, None] * BLOCK_D + d[None, :])
    q_scale = tl.load(q_scale_ptr + rows) * scale
    k_ptr += head * keys * BLOCK_D
    k_scale_ptr += head * keys
    v_ptr += head // heads * v_sample + head % heads * v_head
    y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total, highest = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    y, total, highest = _keys(
        y, total, highest, q, q_scale, k_ptr, k_scale_ptr, v_ptr, v_token, 0, whole, keys, D, BLOCK_D, BLOCK_N, False
    )
    y, total, highest = _keys(
        y, total, highest, q, q_scale, k_ptr, k_scale_ptr, v_ptr, v_token, whole, keys, keys, D, BLOCK_D, BLOCK_N, True
    )
    y = y / total[:, None]
    at = ((head // heads * queries + m) * heads + head % heads)[:, None] * D + d[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(m < queries)[:, None] & (d < D)[None, :])


@triton.jit
def _keys(
    y,
    total,
    highest,
    q,
    q_scale,
    k_ptr,
    k_scale_ptr,
    v_ptr,
    v_token,
    first,
    end,
    keys,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAST: tl.constexpr,
):
    """Keys from `first` to `end` more; `highest` are the largest scores so far, in units of log2, `total` the sums of
    2^(score - highest), y those of these times v. LAST: of a block that is not whole."""
    j, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    for start in range(first, end, BLOCK_N):
        at = (start + j).to(tl.int64)
        inside = at < keys
        k = k_ptr + at[None, :] * BLOCK_D + d[:, None]
        v = v_ptr + at[:, None] * v_token + d[None, :]
        k = tl.load(k, mask=inside[None, :], other=0) if LAST else tl.load(k)
        scores = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)
        unit = q_scale * tl.load(k_scale_ptr + start)
        if LAST:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * unit)
        p = tl.exp2(scores * unit[:, None] - higher[:, None])
        if LAST:
            p = tl.where(inside[None, :], p, 0.0)  # where a unit is zero, that of a score of -inf is NaN
        kept = tl.exp2(highest - higher)
        total = total * kept + tl.sum(p, 1)
        v = tl.load(v, mask=inside[:, None] & (d < D)[None, :], other=0.0) if LAST or D < BLOCK_D else tl.load(v)
        y = tl.dot(p.to(v.dtype), v, y * kept[:, None])
        highest = higher
    return y, total, highest
