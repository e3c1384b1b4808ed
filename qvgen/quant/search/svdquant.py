"""SVDQuant (arXiv 2411.05007): outliers go from the inputs into the weight, and from the weight into a 16-bit low-rank branch.

    λ_k = max|X_k|^α / max|W_k|^(1-α),   X^ = X diag(λ)^-1,   W^ = W diag(λ)      section 4.1, smoothing
    W^ = L1 L2 + R,   L1 L2 = the first r terms of the SVD of W^                    section 4.2, equation 5
    Y = L1 L2 X^ + Q(R) Q(X^)                                                       equation 4

What differs from the paper:

- Rank: the paper's 32 is for layers 3072 wide, where it costs 0.3 bits per weight. Here it is at most a sixteenth of a layer's
  smaller side (QuantScheme.rank_of): rank 32 on a square layer 128 wide costs 8 bits per weight, which is not a 4-bit model.
  Its rank 8 still costs 2, so that W4 with it has 6 bits per weight; at 1536 and rank 32 it is 0.7.
- R has the scheme's grid, by default one per output channel and asymmetric; the paper has symmetric groups of 64 (INT4) or 16
  (NVFP4). This is the variant without groups; `scheme.weights: {strategy: group, group_size: 64}` gives the other.
- Clips: inputs are clipped per timestep group and R's ranges shrunk, both by search, as for every method here. The paper
  combines its method with GPTQ for R; there is no GPTQ here.
- α is searched per layer by the error of its output, as in the paper, but over 0.0, 0.1, ... 1.0, with no smoothing at all as
  one more candidate.
- α is chosen with one clip for all inputs, the best of a few; the clips proper are searched afterwards.
- Layers that read the same input (q, k, v) have a λ each, and every layer divides its inputs by it at run time, in a pass of
  its own. The paper folds λ into the layer before where there is one.
- The branch is not fused with the packed layer (the paper's Nunchaku engine): it is two matrix products beside it.
- Every targeted layer is treated alike. The paper leaves some layers with more bits (those of adaptive norms, the keys and
  values of cross-attention).
- The factors are rounded to bfloat16 before R is taken, so that R makes up for that, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qvgen.quant.fake_quantizer import WeightQuantizer
from qvgen.quant.grid import LayerGrid, quantize_tokens
from qvgen.quant.low_rank import low_rank_factors
from qvgen.quant.scheme import QuantScheme
from qvgen.quant.search import mse
from qvgen.quant.search.settings import SearchSettings
from qvgen.quant.smoothing import smoothing_scale, transform_input, transform_weight

ALPHAS = tuple(i / 10 for i in range(11))
_ROWS = 512  # input rows that an α is judged on
_STRIDE = 3  # every third clip candidate is tried while α is searched


def search_grid(weight: torch.Tensor, inputs: list[torch.Tensor], scheme: QuantScheme, settings: SearchSettings) -> LayerGrid:
    """Grid of a weight (N, K) with its input scale and branch; `inputs` holds recorded rows (m, K) per timestep group.

    Raises ValueError if the scheme lacks input_scaling or low_rank."""
    if not (scheme.input_scaling and scheme.low_rank):
        raise ValueError("svdquant needs a scheme with input_scaling and low_rank")
    weight = weight.detach().float()
    rows = _sample(inputs)
    clips = settings.clip_candidates[::_STRIDE]
    largest = torch.stack([x.abs().amax(0) for x in inputs]).amax(0)
    scales = [torch.ones_like(largest), *(smoothing_scale(largest, weight, alpha) for alpha in ALPHAS)]
    best_error, best = float("inf"), (scales[0], None)
    for scale in scales:
        smoothed = transform_weight(weight, scale, scheme.input_rotation)
        factors = low_rank_factors(smoothed, scheme.rank_of(*weight.shape))
        residual = smoothed - factors[0] @ factors[1]
        grid = mse.search_weight_grid(residual, scheme.weights, settings)
        quantized = WeightQuantizer(scheme.weights, *grid).dequantized(residual)
        x = transform_input(rows, scale, scheme.input_rotation)
        error = _output_error(x, residual, quantized, scheme, clips)
        if error < best_error:
            best_error, best = error, (scale, factors)
    return mse.search_grid(weight, inputs, scheme, settings, input_scale=best[0], low_rank=best[1])


def _sample(inputs: list[torch.Tensor]) -> torch.Tensor:
    """The same share of every timestep group's rows; they were recorded in random order."""
    return torch.cat([x[: max(1, _ROWS // len(inputs))] for x in inputs])


def _output_error(
    x: torch.Tensor, residual: torch.Tensor, quantized: torch.Tensor, scheme: QuantScheme, clips: Sequence[float]
) -> float:
    """|R X^ - Q(R) Q(X^)|^2 with the best of the clips; the branch, exact, cancels."""
    output = x @ residual.T
    if scheme.input_activations is None:
        return float((x @ quantized.T - output).square().sum())
    tried = (quantize_tokens(x, torch.tensor(c), torch.tensor(c), scheme.input_activations) for c in clips)
    return min(float((q @ quantized.T - output).square().sum()) for q in tried)
