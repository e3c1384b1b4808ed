"""Hadamard rotation of channels in blocks: an outlier is spread over its block and no longer makes the range of its token.

An orthogonal H leaves a linear layer as it is, (x H)(W H)^T = x W^T, while what is quantized is x H and W H.
Source: QuaRot (arXiv 2404.00456), section 4.
"""

from __future__ import annotations

from functools import cache

import torch


def rotate(x: torch.Tensor, size: int) -> torch.Tensor:
    """x (..., K) times the block diagonal matrix of Hadamard matrices (size, size), differentiable. H is symmetric, so that a
    second rotation undoes the first. `size` must divide K."""
    return (x.unflatten(-1, (-1, size)) @ hadamard(size).to(x)).flatten(-2)


@torch.compiler.assume_constant_result
def hadamard(size: int) -> torch.Tensor:
    """Sylvester's matrix (size, size) float32 on the CPU, orthonormal and symmetric; `size` is a power of two. One tensor for
    all layers: not to be written to."""
    return _hadamard(size)


@cache
def _hadamard(size: int) -> torch.Tensor:
    # Kept from call to call: a tensor made in inference mode could not be used in training afterwards.
    with torch.inference_mode(False):
        bits = torch.arange(size, device="cpu")
        common = bits[:, None] & bits
        ones = sum((common >> i) & 1 for i in range(size.bit_length() - 1))
        return (1.0 - 2.0 * (torch.as_tensor(ones) % 2)).expand(size, size) / size**0.5
