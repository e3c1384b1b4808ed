"""Dense bit streams: rows of codes to 32-bit words and back, every width from 2 to 8 bits.

Code k of a row occupies bits [k b, (k + 1) b) of that row's stream, low bits first; word j of the row holds stream bits
[32 j, 32 j + 32), and the last word is filled up with zeros. For 2, 4 and 8 bits no code crosses a word, and the words are
byte for byte those of compressed-tensors; for the others nothing is wasted: 3 bits are 3.0 bits.
"""

from __future__ import annotations

import math

import torch

MIN_BITS, MAX_BITS = 2, 8
_WORD = 32


def packed_words(in_features: int, num_bits: int) -> int:
    """Words per row: ceil(in_features * num_bits / 32)."""
    _check_bits(num_bits)
    return -(-in_features * num_bits // _WORD)


def pack(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Codes (N, K) uint8 in [0, 2**num_bits - 1] as words (N, ceil(K num_bits / 32)) int32, on the same device.

    Raises ValueError for another width, shape or dtype, and for a code that does not fit.
    """
    _check_bits(num_bits)
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(f"codes must be a uint8 tensor of shape (N, K), not {codes.dtype} {tuple(codes.shape)}")
    limit = 2**num_bits - 1
    if codes.numel() and (largest := int(codes.max())) > limit:
        raise ValueError(
            f"codes of {num_bits} bits are at most {limit}, found {largest}: clamp them before packing, or pack more bits"
        )
    n, k = codes.shape
    words = packed_words(k, num_bits)
    # The pattern repeats every `period` codes, which fill whole bytes; there are at most 8 of them, so each step below
    # works on whole strided columns.
    period, size = _period(num_bits)
    periods = -(-words * 4 // size)
    padded = codes.new_zeros((n, periods, period))
    padded.flatten(1)[:, :k] = codes
    packed = codes.new_zeros((n, periods, size))
    for i in range(period):
        byte, shift = divmod(i * num_bits, 8)
        packed[..., byte] |= padded[..., i] << shift  # uint8: what crosses the byte falls off ...
        if shift + num_bits > 8:
            packed[..., byte + 1] |= padded[..., i] >> (8 - shift)  # ... and lands here
    result = codes.new_empty((n, words), dtype=torch.int32)
    result.view(torch.uint8).copy_(packed.flatten(1)[:, : words * 4])
    return result


def unpack(words: torch.Tensor, num_bits: int, in_features: int) -> torch.Tensor:
    """Inverse of `pack`: codes (N, in_features) uint8. Raises ValueError if the shape or dtype cannot hold them."""
    expected = packed_words(in_features, num_bits)
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != expected:
        raise ValueError(
            f"{in_features} codes of {num_bits} bits take {expected} int32 words per row, "
            f"found {words.dtype} {tuple(words.shape)}"
        )
    n = words.shape[0]
    period, size = _period(num_bits)
    periods = -(-in_features // period)
    # A copy: `view` as bytes needs strides that even a contiguous tensor with a dimension of 1 may not have.
    stream = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    packed = stream.new_zeros((n, periods, size))
    used = min(stream.shape[1], periods * size)
    packed.flatten(1)[:, :used] = stream[:, :used]
    codes = stream.new_empty((n, periods, period))
    mask = 2**num_bits - 1
    for i in range(period):
        byte, shift = divmod(i * num_bits, 8)
        column = packed[..., byte] >> shift
        if shift + num_bits > 8:
            column |= packed[..., byte + 1] << (8 - shift)
        codes[..., i] = column & mask
    return codes.flatten(1)[:, :in_features].contiguous()


def _period(num_bits: int) -> tuple[int, int]:
    """Smallest number of codes that fills whole bytes, and that number of bytes."""
    bits = math.lcm(num_bits, 8)
    return bits // num_bits, bits // 8


def _check_bits(num_bits: int) -> None:
    if not MIN_BITS <= num_bits <= MAX_BITS:
        raise ValueError(f"packing supports {MIN_BITS} to {MAX_BITS} bits, not {num_bits}")
