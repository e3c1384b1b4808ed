"""Q-DM (NeurIPS 2023): timestep-aware smoothing of activations, whose distribution drifts from timestep to timestep.

    m_gk = max|X_gk| / mean_k max|X_gk|     profile of timestep group g, free of its overall level
    s_k = (mean_g m_gk)^α / max|W_k|^(1-α),   Y = Q(W diag(s)) Q(X diag(s)^-1)

This file is the calibration. The method's other half, noise-estimating mimicking, is a loss of training: mean squared
difference between the outputs of student and full-precision teacher.

What differs from the paper:

- Timestep-aware quantization there normalizes activations inside the attention blocks of a U-Net (queries, keys) by mean and
  variance over a batch that mixes timesteps, with learned affine parameters, before a learned static quantizer. Here
  quantizers are dynamic per token and follow any overall level already. What remains for a static correction is the
  imbalance between channels: s evens it out, from statistics in which each group of timesteps counts the same, so that the
  noise level with the largest activations does not decide alone. s is fixed, not learned, and there is no shift by a mean.
- All targeted linear layers get it, not attention alone.
- α is 0.5.
- Weight ranges are shrunk and inputs clipped per timestep group by search, as for every method here.
"""

from __future__ import annotations

import torch

from qvgen.quant.grid import LayerGrid
from qvgen.quant.scheme import QuantScheme
from qvgen.quant.search import mse
from qvgen.quant.search.settings import SearchSettings
from qvgen.quant.smoothing import smoothing_scale

ALPHA = 0.5


def search_grid(weight: torch.Tensor, inputs: list[torch.Tensor], scheme: QuantScheme, settings: SearchSettings) -> LayerGrid:
    """Grid of a weight (N, K) with its input scale; `inputs` holds recorded rows (m, K) per timestep group.

    Raises ValueError if the scheme lacks input_scaling."""
    if not scheme.input_scaling:
        raise ValueError("qdm needs a scheme with input_scaling")
    scale = smoothing_scale(balanced_max(inputs), weight, ALPHA)
    return mse.search_grid(weight, inputs, scheme, settings, input_scale=scale)


def balanced_max(inputs: list[torch.Tensor]) -> torch.Tensor:
    """mean_g m_gk (K,): each channel's largest input relative to its timestep group's mean of them, averaged over groups. A
    group whose inputs are all zero says nothing and is left out."""
    largest = torch.stack([x.float().abs().amax(0) for x in inputs])
    level = largest.mean(1, keepdim=True)
    profiles = largest / level.clamp(min=torch.finfo(torch.float32).tiny)
    return profiles.sum(0) / max(1, int((level > 0).sum()))
