"""Weights as the cpu backend keeps them, from any codes."""

import numpy as np
import torch

from qvgen.kernels.cpu.backend import CpuBackend
from qvgen.kernels.registry import PackedWeight, PreparedWeight
from qvgen.packing.bits import pack
from qvgen.packing.layout import row_sums
from qvgen.quant.scheme import QuantArgs

TOKENS = QuantArgs(num_bits=8, strategy="token")


def stored_weight(codes_NK: np.ndarray, bits: int, groups: int = 1) -> PackedWeight:
    """Codes (N, K) with scales of 1 and zero points of 0."""
    codes = torch.from_numpy(codes_NK.astype(np.uint8))
    n, k = codes.shape
    strategy = {"strategy": "group", "group_size": k // groups} if groups > 1 else {}
    grid = torch.ones(n, groups), torch.zeros(n, groups)
    return PackedWeight(pack(codes, bits), *grid, row_sums(codes, groups), k, QuantArgs(num_bits=bits, **strategy), TOKENS)


def prepared_weight(codes_NK: np.ndarray, bits: int, groups: int = 1) -> PreparedWeight:
    return CpuBackend().prepare(stored_weight(codes_NK, bits, groups))


def some_codes(generator: np.random.Generator, shape: tuple[int, int], bits: int, kind: str) -> np.ndarray:
    """Codes of `bits` bits as int64: "any", "extreme" (only 0 and the largest), "zero" or "largest"."""
    top = 2**bits - 1
    if kind == "any":
        return generator.integers(0, top + 1, shape)
    if kind == "extreme":
        return top * generator.integers(0, 2, shape)
    return np.full(shape, {"zero": 0, "largest": top}[kind])
