"""The 16-bit low-rank branch: it takes the largest directions of a weight, so that what is left is easier to quantize."""

from __future__ import annotations

import torch

from qvgen.device import widest_float


def low_rank_factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors up (N, R) and down (R, K) of the best rank-R approximation of a weight (N, K), float32 that bfloat16 holds.

    From the eigenvectors of the smaller Gram matrix, in float64: a full SVD of a wide layer takes many times as long. The
    factors are rounded here, before the residual is taken, so that storing them in 16 bits loses nothing: the packed
    residual makes up for their rounding.
    """
    w = weight.detach().to(widest_float(weight.device))
    wide = w.shape[0] <= w.shape[1]
    _, vectors = torch.linalg.eigh(w @ w.T if wide else w.T @ w)  # ascending
    basis = vectors[:, -rank:].flip(1)
    up, down = (basis, basis.T @ w) if wide else (w @ basis, basis.T)
    # Each side gets the root of the singular values, which keeps both far from the limits of 16-bit floats.
    root = (down if wide else up.T).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    up, down = (up * root, down / root[:, None]) if wide else (up / root, down * root[:, None])
    return up.bfloat16().float().contiguous(), down.bfloat16().float().contiguous()
