"""ViDiT-Q (arXiv 2406.02540): static-dynamic channel balance for diffusion transformers, dynamic quantization per token.

    s_k = max|X_k|^α / max|W_k|^(1-α),   X^ = X diag(s)^-1,   W^ = W diag(s)      static balance: scaling
    X~ = X^ H,   W~ = W^ H,   Y = Q(W~) Q(X~)                                      dynamic balance: rotation

Scaling takes the imbalance of channels that is always there, rotation what of it changes with the timestep. Grids of inputs
are dynamic, per token; those of weights are per output channel, as the scheme says.

What differs from the paper:

- max|X_k| is over recorded inputs of all timesteps. The paper takes the imbalance at the first timestep for the static one.
- α is 0.5 in every layer; the paper's code sets it per model in a config file.
- H is a block diagonal matrix of Hadamard matrices whose size is a power of two (scheme.input_rotation), because the widths of
  video models are not powers of two (1536 = 3 * 512, 8960 = 35 * 256). The paper rotates the whole width, with random signs.
- Scaling and rotation are done at run time, before each layer. The paper folds them into the layer before where it can.
- No mixed precision: the metric-decoupled choice of bits per layer is left out, every layer has the scheme's bits. The paper
  does not claim W4A4.
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

    Raises ValueError if the scheme lacks input_scaling or input_rotation."""
    if not (scheme.input_scaling and scheme.input_rotation):
        raise ValueError("viditq needs a scheme with input_scaling and input_rotation")
    largest = torch.stack([x.abs().amax(0) for x in inputs]).amax(0)
    return mse.search_grid(weight, inputs, scheme, settings, input_scale=smoothing_scale(largest, weight, ALPHA))
