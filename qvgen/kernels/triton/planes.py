"""Weights out of their bit planes (layout.py): tiles inside a product's loop, or a whole layer into a buffer."""
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# A kernel's launch takes num_warps and the like, and its language is Triton's, neither of which pyright can know.

import triton
import triton.language as tl


@triton.jit
def load_bytes(w_ptr, offsets, inside, plane_bytes, BITS: tl.constexpr):
    """The one tile of bytes that holds the codes of all planes, or the three of 3 bits; each in `offsets`' shape."""
    first = tl.load(w_ptr + offsets, mask=inside, other=0)
    if BITS == 3:
        second = tl.load(w_ptr + plane_bytes + offsets, mask=inside, other=0)
        third = tl.load(w_ptr + 2 * plane_bytes + offsets, mask=inside, other=0)
    else:
        second, third = first, first
    return first, second, third


@triton.jit
def plane(first, second, third, P: tl.constexpr, BITS: tl.constexpr):
    """Codes of plane P, less 2^(BITS - 1), int8; from 5 bits on bytes hold them already. Exact."""
    if BITS == 4:
        codes = ((first >> 4 * P) & 15).to(tl.int8) - 8
    elif BITS == 2:
        codes = ((first >> 2 * P) & 3).to(tl.int8) - 2
    elif BITS == 3:
        low = first if P < 4 else second
        codes = (((low >> 2 * (P % 4)) & 3) | (((third >> P) & 1) << 2)).to(tl.int8) - 4
    else:
        codes = first
    return codes


@triton.jit
def unpack_kernel(
    w_ptr,
    out_ptr,
    scale_ptr,
    zero_point_ptr,
    N,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    DEQUANTIZE: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """A layer's codes in rows: program (i, j) writes BLOCK_N rows, BLOCK_J columns of every plane of a group.

    w            (N, row bytes) as layout.py has it, WIDTH codes to a plane
    out          (N, OUT_STRIDE): int8 or e4m3 codes less 2^(BITS - 1), exact; with DEQUANTIZE the values
                 s (q - z) of float32 arithmetic, as in primitives.dequantize, rounded once to the dtype of `out`
    scale, zero_point    (N, GROUPS) float32, read with DEQUANTIZE; zero_point only if ASYMMETRIC
    """
    CENTRE: tl.constexpr = 2 ** (BITS - 1)
    TILES: tl.constexpr = (WIDTH + BLOCK_J - 1) // BLOCK_J
    BYTES: tl.constexpr = 3 * WIDTH if BITS == 3 else WIDTH
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.program_id(1) // TILES
    j = (tl.program_id(1) % TILES) * BLOCK_J + tl.arange(0, BLOCK_J)
    inside = (n < N)[:, None] & (j < WIDTH)[None, :]
    offsets = n[:, None] * (GROUPS * BYTES) + g * BYTES + j[None, :]
    first, second, third = load_bytes(w_ptr, offsets, inside, WIDTH, BITS)
    for p in tl.static_range(PLANES):
        codes = plane(first, second, third, p, BITS)
        if DEQUANTIZE:
            grid = n * GROUPS + g
            scale = tl.load(scale_ptr + grid, mask=n < N, other=1.0)
            values = codes.to(tl.float32) + CENTRE
            if ASYMMETRIC:
                zero_point = tl.load(zero_point_ptr + grid, mask=n < N, other=0.0)
                values = values - zero_point[:, None]
            else:
                values = values - CENTRE
            written = (scale[:, None] * values).to(out_ptr.dtype.element_ty)
        else:
            written = codes.to(tl.float32).to(out_ptr.dtype.element_ty)  # exact, and there is no cast from int8 to e4m3
        k = p * WIDTH + j
        at = n[:, None] * OUT_STRIDE + g * GROUP_SIZE + k[None, :]
        tl.store(out_ptr + at, written, mask=inside & (k < GROUP_SIZE)[None, :])
