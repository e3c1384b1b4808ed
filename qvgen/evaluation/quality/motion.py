"""How much a clip moves, without any weights: differences between frames.

Plain pixel statistics, comparable only between clips of the same prompts; they imitate no published score. A quantized
model that freezes scores well on similarity of neighbouring frames, so motion is always shown beside quality.
"""

from __future__ import annotations

import torch

from qvgen.evaluation.quality.similarity import in_parts


def motion(clips: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring frames per clip, as a fraction of the pixel range.

    Clips (n, 3, t, h, w) in [-1, 1] -> (n,) float32 in [0, 1]; 0 is a still picture (so is a clip of one frame).
    """
    return in_parts(lambda part: _mean_magnitude(part.float().diff(dim=2)), clips)


def flicker(clips: torch.Tensor) -> torch.Tensor:
    """Mean absolute second difference over time per clip, as a fraction of the pixel range.

    A pixel that brightens at a steady pace has none; one that jumps back and forth has twice its motion.
    Clips (n, 3, t, h, w) in [-1, 1] -> (n,) float32 in [0, 2]; 0 for fewer than three frames.
    """
    if clips.shape[2] < 3:
        return torch.zeros(len(clips))
    return in_parts(lambda part: _mean_magnitude(part.float().diff(n=2, dim=2)), clips)


def _mean_magnitude(difference: torch.Tensor) -> torch.Tensor:
    if difference.numel() == 0:
        return torch.zeros(difference.shape[0])
    return difference.abs().flatten(1).mean(1) / 2
