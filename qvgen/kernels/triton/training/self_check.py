"""The fused kernels against PyTorch's code before they are first used: on one card, for a length of rows, dtypes and a grid.

A kernel that a compiler, a driver or a card makes wrong would train a model wrongly without a word. So a few rows are
quantized both ways, forward and backward, and compared: outputs and the gradient of x bit for bit, sums within their rounding,
as in tests/kernels/triton/kernels/test_training.py. It costs a launch of kernels that are compiled anyway, and a wait for the
GPU. PyTorch's code runs on the CPU, where nothing rounds products to TF32.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qvgen.kernels.registry import ENVIRONMENT
from qvgen.quant.primitives import gradients, quantized, range_to_grid
from qvgen.quant.scheme import QuantArgs

ROWS = 8
# Of the sum of absolute values: float32 sums in another order, and the roundings of each term.
SUMS = 2e-6
_BFLOAT16 = 2.0**-7  # Triton's interpreter, on the CPU, cuts float32 off where a GPU rounds it
_log = logging.getLogger(__name__)
_lock = threading.Lock()
_agreed: set[tuple[Any, ...]] = set()
_wrong: dict[torch.device, str] = {}  # what was found there; the kernels are used no more, whatever their arguments
_announced: set[torch.device] = set()


class Kernels(NamedTuple):
    """As FusedFakeQuantize has them."""

    forward: Callable[[Tensor, Tensor, Tensor, QuantArgs, torch.dtype], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, QuantArgs], tuple[Tensor, Tensor, Tensor]]


def agree(kernels: Kernels, x: Tensor, args: QuantArgs, dtype: torch.dtype, forced: bool) -> bool:
    """Whether the kernels compute on the device of x what PyTorch's code does, for rows of its length and dtype and an output
    in `dtype`. Where they do not, a warning says once what differs; `forced`: raises RuntimeError instead."""
    device = x.device
    key = device, x.shape[-1], x.dtype, dtype, args.max_code, args.zero_point_domain
    if key in _agreed and not _wrong:
        return True
    with _lock:
        if key not in _agreed and device not in _wrong:
            if found := difference(kernels, x.shape[-1], x.dtype, args, dtype, device):
                _wrong[device] = f"{found} ({args.num_bits} bits, rows of {x.shape[-1]}, {x.dtype} to {dtype}, on {device})"
            else:
                _agreed.add(key)
        reason = _wrong.get(device)
        announced = device in _announced
        if reason and not forced:
            _announced.add(device)
    if reason is None:
        return True
    if forced:
        raise RuntimeError(
            f"{ENVIRONMENT}=triton asks for fake quantization by kernels that do not compute what PyTorch's code does: "
            f"{reason}; unset {ENVIRONMENT} to train with PyTorch's code"
        )
    if not announced:
        _log.warning(
            "the fused kernels of fake quantization do not compute what PyTorch's code does: %s. From now on PyTorch's code "
            "runs there, which takes longer; %s=reference asks for it from the start",
            *(reason, ENVIRONMENT),
        )
    return False


def difference(
    kernels: Kernels, k: int, x_dtype: torch.dtype, args: QuantArgs, dtype: torch.dtype, device: torch.device
) -> str:
    """What the kernels compute otherwise than PyTorch's code, in words; empty if nothing."""
    x, scale, zero_point, grad = _rows(k, x_dtype, args, dtype)
    expected = quantized(x, scale, zero_point, args, dtype), *gradients(grad, x, scale, zero_point, args)
    try:
        there, *grid = (tensor.to(device) for tensor in (x, scale, zero_point))
        outputs = kernels.forward(there, grid[0], grid[1], args, dtype)
        found = [t.cpu() for t in (outputs, *kernels.backward(grad.to(device), there, grid[0], grid[1], args))]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a driver raises
        return f"they fail, {type(error).__name__}: {str(error).strip()[:500]}"
    y, up = expected[0].float(), grad.float()
    size = (up * y).abs().sum(-1, keepdim=True) + (up * x.float()).abs().sum(-1, keepdim=True)
    cut, cut_x = (_BFLOAT16 if kind is torch.bfloat16 and device.type == "cpu" else 0.0 for kind in (dtype, x_dtype))
    bounds = {
        "outputs": cut * y.abs(),
        "gradients of x": cut_x * up.abs(),
        "gradients of scale": SUMS * size / scale,
        "gradients of zero_point": SUMS * scale * up.abs().sum(-1, keepdim=True),
    }
    for (name, bound), ours, theirs in zip(bounds.items(), found, expected, strict=True):
        if said := _beyond(ours, theirs, bound):
            return f"{name} {said}"
    return ""


def _rows(k: int, x_dtype: torch.dtype, args: QuantArgs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x (ROWS, k), grids (ROWS, 1) that clamp some of it, and a gradient: a row of ties, the rest random."""
    with torch.device("cpu"):  # whatever the default
        generator = torch.Generator().manual_seed(0)
        x = 3 * torch.randn(ROWS, k, generator=generator, dtype=torch.float32) + 0.3
        grad = torch.randn(ROWS, k, generator=generator, dtype=torch.float32).to(dtype)
        x[0] = torch.arange(k, dtype=torch.float32) % (2 * args.max_code + 8) / 2 - args.max_code / 2 - 2
        x = x.to(x_dtype)
        lower, upper = (0.6 * f(x.float(), -1, keepdim=True) for f in (torch.amin, torch.amax))
        scale, zero_point = range_to_grid(lower, upper, args)
        scale[0], zero_point[0] = 1.0, args.max_code // 2
    return x, scale, zero_point, grad


def _beyond(ours: Tensor, theirs: Tensor | None, bound: Tensor) -> str:
    assert theirs is not None
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"are {ours.dtype} {tuple(ours.shape)} instead of {theirs.dtype} {tuple(theirs.shape)}"
    off = (ours.float() - theirs.float()).abs()
    wrong = ~(off <= bound)  # of NaN too
    if not wrong.any():
        return ""
    return f"differ in {int(wrong.sum())} of {wrong.numel()}, by up to {float(off.nan_to_num(nan=torch.inf).max()):.3g}"
