"""How close a clip is to the same clip of the full-precision model: squared error, PSNR, SSIM.

Meaningful only for clips made from the same prompt and the same noise. Every function returns one value per clip, so
that the caller decides how to average; PSNR in particular is averaged over clips in dB, as the field reports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

AT_ONCE = 2**26  # numbers that are compared at a time, 256 MB in float32: the embedded trial has fewer
DATA_RANGE = 2.0  # peak to peak of clips in [-1, 1]
MAX_PSNR_DB = 100.0  # given to identical clips, whose PSNR is infinite and would swallow every mean
_SSIM_WINDOW = 11  # pixels that a Gaussian of sigma 1.5, cut at 3.5 sigma, covers


def mse(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Mean squared difference per entry of the first dimension: (n, ...) and (n, ...) -> (n,) float32."""
    _same_shape(reference, candidate)
    if reference.numel() <= AT_ONCE:
        return (reference.float() - candidate.float()).square().flatten(1).mean(1)
    return torch.stack([_mean_square(*pair) for pair in zip(reference.flatten(1), candidate.flatten(1), strict=True)])


def _mean_square(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of the difference of two vectors, in parts, so that what is computed with stays small."""
    parts = zip(a.split(AT_ONCE), b.split(AT_ONCE), strict=True)
    squares = [(x.float() - y.float()).square().sum(dtype=torch.float64) for x, y in parts]
    return (torch.stack(squares).sum() / a.numel()).float()


def in_parts(function: Callable[[torch.Tensor], torch.Tensor], clips: torch.Tensor) -> torch.Tensor:
    """`function` of clips (n, ...) -> (n,), of some at a time where they are large."""
    if clips.numel() <= AT_ONCE:
        return function(clips)
    return torch.cat([function(part) for part in clips.split(max(1, AT_ONCE * len(clips) // clips.numel()))])


def psnr_db(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB per clip, over all its pixels, channels and frames.

    Clips (n, 3, t, h, w) in [-1, 1], so the peak is 2: shifting both to [0, 1] gives the same number. At most
    MAX_PSNR_DB. Returns (n,) float32.
    """
    error = mse(reference, candidate)
    return (10 * torch.log10(DATA_RANGE**2 / error)).clamp(max=MAX_PSNR_DB)


def ssim(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Structural similarity per clip, in [-1, 1]: mean over frames and colour channels.

    Clips (n, 3, t, h, w) in [-1, 1]. Gaussian window of sigma 1.5 and population covariance, as in Wang et al. 2004.
    Returns (n,) float32. Raises ValueError for pictures smaller than the window.
    """
    from skimage.metrics import structural_similarity

    _same_shape(reference, candidate)
    if reference.ndim != 5 or min(reference.shape[-2:]) < _SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs clips (n, 3, t, h, w) of {_SSIM_WINDOW}x{_SSIM_WINDOW} pixels or more, got {tuple(reference.shape)}"
        )
    pairs = zip(_frames(reference), _frames(candidate), strict=True)
    per_frame = [
        structural_similarity(
            a, b, data_range=DATA_RANGE, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in pairs
    ]
    return torch.tensor(per_frame, dtype=torch.float32).view(reference.shape[0], -1).mean(1)


def _frames(clips: torch.Tensor) -> Iterator[np.ndarray]:
    for clip in clips:
        yield from clip.float().transpose(0, 1).contiguous().numpy()


def _same_shape(reference: torch.Tensor, candidate: torch.Tensor) -> None:
    if reference.shape != candidate.shape:
        raise ValueError(f"cannot compare shapes {tuple(reference.shape)} and {tuple(candidate.shape)}")
