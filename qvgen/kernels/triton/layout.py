"""How a weight lies in GPU memory: bit planes, so that a kernel gets whole tiles of codes by a shift and a mask.

A group of columns (all of K without groups) is cut into PLANES[bits] equal pieces, the planes. Byte j of a group holds code j
of every plane:

    4 bits    2 planes, a byte:      code of plane p = byte >> 4p & 15
    2 bits    4 planes, a byte:      byte >> 2p & 3
    3 bits    8 planes, three bytes: low two bits from byte p // 4 at 2 (p % 4), the third from byte 2 at p
    5 to 8    1 plane, a byte:       code - 2^(bits - 1), signed

The three bytes of 3 bits lie a row of bytes apart, not side by side. A product over k may run over planes in any order, so
nothing has to be shuffled: a tile of codes of plane p meets columns p J + j of the input, J = ceil(group / planes).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qvgen.packing.bits import pack, unpack

PLANES = {2: 4, 3: 8, 4: 2}
_UNPACKED = 2**24  # codes at a time: a layer of 5120 x 13824 unpacked whole would take 71 MB more for a moment


class Planes(NamedTuple):
    """Sizes of one group of columns."""

    count: int  # planes
    width: int  # J, codes in each
    bytes: int  # of a row of the group


def planes(group_size: int, num_bits: int) -> Planes:
    count = PLANES.get(num_bits, 1)
    width = -(-group_size // count)
    return Planes(count, width, 3 * width if num_bits == 3 else width)


def row_bytes(in_features: int, groups: int, num_bits: int) -> int:
    return groups * planes(in_features // groups, num_bits).bytes


def to_planes(words: torch.Tensor, in_features: int, groups: int, num_bits: int) -> torch.Tensor:
    """(N, row_bytes) uint8 (int8 from 5 bits on) of stored words (N, ...) int32, on their device."""
    n, size = len(words), in_features // groups
    count, width, _ = planes(size, num_bits)
    dtype = torch.uint8 if num_bits in PLANES else torch.int8
    result = torch.empty((n, row_bytes(in_features, groups, num_bits)), dtype=dtype, device=words.device)
    for start, stop in _parts(n, in_features):
        codes = unpack(words[start:stop], num_bits, in_features)
        rows = stop - start
        if num_bits not in PLANES:
            result[start:stop] = (codes - 2 ** (num_bits - 1)).view(torch.int8)  # wraps, as meant
            continue
        padded = codes.new_zeros((rows, groups, count * width))
        padded[..., :size] = codes.view(rows, groups, size)
        planar = padded.view(rows, groups, count, width)
        if num_bits == 3:
            packed = codes.new_zeros((rows, groups, 3, width))
            for p in range(count):
                packed[:, :, p // 4] |= (planar[:, :, p] & 3) << 2 * (p % 4)
                packed[:, :, 2] |= (planar[:, :, p] >> 2) << p
        else:
            packed = codes.new_zeros((rows, groups, width))
            for p in range(count):
                packed |= planar[:, :, p] << num_bits * p
        result[start:stop] = packed.flatten(1)
    return result


def to_words(weight: torch.Tensor, in_features: int, groups: int, num_bits: int) -> torch.Tensor:
    """Inverse of `to_planes`."""
    n, size = len(weight), in_features // groups
    parts = []
    for start, stop in _parts(n, in_features):
        part = weight[start:stop]
        if num_bits not in PLANES:
            codes = part.view(torch.uint8) + 2 ** (num_bits - 1)
        else:
            count, width, _ = planes(size, num_bits)
            if num_bits == 3:
                grouped = part.view(stop - start, groups, 3, width)
                found = [grouped[:, :, p // 4] >> 2 * (p % 4) & 3 | (grouped[:, :, 2] >> p & 1) << 2 for p in range(count)]
            else:
                grouped, mask = part.view(stop - start, groups, width), 2**num_bits - 1
                found = [grouped >> num_bits * p & mask for p in range(count)]
            codes = torch.stack(found, 2).flatten(2)[..., :size].flatten(1)
        parts.append(pack(codes.contiguous(), num_bits))
    return torch.cat(parts)


def _parts(n: int, in_features: int) -> list[tuple[int, int]]:
    rows = max(1, _UNPACKED // in_features)
    return [(start, min(n, start + rows)) for start in range(0, n, rows)]
