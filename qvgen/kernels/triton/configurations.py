"""Tiles, warps and stages of each kernel, per architecture, and where a layer is unpacked whole.

No GPU has measured these yet: they are the largest tiles that fit each card's shared memory with a pipeline of at least
two stages and spill nothing (tests/kernels/triton/test_offline.py compiles all of them). `python -m bench.linear --device
cuda` is to replace them with measured ones.
"""

from __future__ import annotations

from typing import NamedTuple

from qvgen.kernels.triton.architectures import Architecture

SCRATCH_FROM = 128  # tokens; below, weights are unpacked inside the product's loop. A guess until it is measured
ROW_VALUES_PER_WARP = 1024
FEWEST_TOKENS = 1024  # of a block in a feed-forward: fewer leave a large card's processors without tiles. A guess too
_ROWS = 128  # of the tiles of large products


class Gemm(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swizzle: int = 8


def unpacks_in_loop(tokens: int, groups: int, weight_bits: int) -> bool:
    """Whether the product reads bit planes itself. With groups it does not: a group of 128 has planes of 16 to 64 columns,
    and tensor cores want 32 at a time."""
    return tokens < SCRATCH_FROM and groups == 1 and weight_bits in (2, 3, 4)


def tokens_together(tokens: int, k: int, hidden: int, element_bytes: int, cache_bytes: int) -> int:
    """Tokens whose wide intermediate, between two layers of a feed-forward, is made and quantized at a time: as many as find
    room in the L2 cache with their codes, beside the first layer's bytes. Else its values would go out to memory and come
    back, because the range of a token needs all of its row. All tokens where few would fit."""
    fit = (cache_bytes - k * hidden) // (hidden * (element_bytes + 1)) // _ROWS * _ROWS
    if fit < FEWEST_TOKENS or fit >= tokens:
        return tokens
    blocks = -(-tokens // fit)
    return -(-tokens // (blocks * _ROWS)) * _ROWS


def gemm(
    architecture: Architecture,
    tokens: int,
    groups: int,
    group_size: int,
    in_loop_bits: int | None,
    many_registers: bool,
) -> Gemm:
    """Of a product of `tokens` rows; `in_loop_bits` where it reads bit planes of so many bits; `many_registers` where its
    epilogue needs them: a residual after products in e4m3, or with float32 gates of each token."""
    if in_loop_bits == 3:  # eight products to a tile of bytes
        return Gemm(16 if tokens <= 16 else 32, 32, 32, 4, 2)
    if in_loop_bits is not None:  # at 2 bits, four products to a tile of bytes, 64 x 64 spill on sm_100 (Triton 3.6)
        return Gemm(16 if tokens <= 16 else 32 if tokens <= 32 else 64, 32 if in_loop_bits == 2 else 64, 64, 4, 3)
    if groups > 1:
        # float32 totals beside the int32 sums: half the tile of one group
        return Gemm(64, 64, min(128, max(32, _power_of_two(group_size))), 4, 2)
    if tokens <= 64:
        return Gemm(64, 64, 128, 4, 3)
    if many_registers:  # 128 x 128 spills on sm_103 and, in float32, on sm_100
        return Gemm(128, 64, 128 if architecture.shared_bytes >= 150_000 else 64, 8, 3)
    # 128 x 256 spills on sm_90 (with a GELU) and, in e4m3, on sm_103.
    if architecture.shared_bytes >= 200_000:
        return Gemm(128, 128, 128, 8, 4)
    return Gemm(128, 128, 128 if architecture.shared_bytes >= 150_000 else 64, 8, 3)


def weight_only(tokens: int, bits: int) -> Gemm:
    """Of a product that reads bit planes beside 16-bit inputs. At 2 bits, with four products to a tile of bytes, 64 x 64
    outputs spill before sm_90 and on sm_120."""
    rows = 16 if tokens <= 16 else 32 if tokens <= 32 or bits < 4 else 64
    return Gemm(rows, 32, 32, 4, 2) if bits == 3 else Gemm(rows, 64, 64, 4, 3)


def row_warps(block: int) -> int:
    """Warps for a row of `block` values in registers."""
    return min(16, max(1, block // ROW_VALUES_PER_WARP))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
