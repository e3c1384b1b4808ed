"""Fake quantization in training by kernels, one pass forward and one backward: which run, by the device of x.

`auto` takes those of the device: Triton's on a GPU, C++ on the CPU. QVGEN_KERNELS=reference keeps PyTorch's operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvgen.kernels.cpu import training as cpu
from qvgen.kernels.triton.block_functions import MOST_FEATURES
from qvgen.kernels.triton.training import launch as triton
from qvgen.quant.primitives import FusedFakeQuantize
from qvgen.quant.scheme import QuantArgs


def choose(x: Tensor, scale: Tensor, zero_point: Tensor, args: QuantArgs, dtype: torch.dtype) -> FusedFakeQuantize | None:
    """The kernels that quantize x to values in `dtype`; None where PyTorch's operations do.

    Raises RuntimeError for kernels that QVGEN_KERNELS asks for by name and that cannot run.
    """
    if not _one_grid_a_row(x, scale, zero_point):
        return None
    if triton.runs(x, args, dtype):
        return triton
    return cpu if cpu.runs(x, dtype) else None


def _one_grid_a_row(x: Tensor, scale: Tensor, zero_point: Tensor) -> bool:
    grid = (*x.shape[:-1], 1)
    whole = scale.shape == zero_point.shape == grid and scale.dtype == zero_point.dtype == torch.float32
    return whole and 0 < x.shape[-1] <= MOST_FEATURES and x.numel() > 0
