"""Quantization of one layer: the scheme, the rounding, and the search of a grid. Nothing here knows a model.

    scheme = QuantScheme(weights=QuantArgs(num_bits=4), timestep_groups=1)
    settings = SearchSettings(weight_candidates=80, mse_exponent=2.4, clip_candidates=(0.95, 0.9, 0.8))
    grid = search_grid(weight, [rows], scheme, settings)     # weight (N, K), rows (m, K): what the layer reads
    layer_error(weight, grid, [rows], scheme).output         # relative squared error of its output
    WeightQuantizer(scheme.weights, grid.scale, grid.zero_point)(weight)   # on its grid, differentiable

`QuantArgs`, `QuantScheme` and `SearchSettings` are read from params.yaml and load no PyTorch; the other names load it when
they are first used. Other ways to search: quant/search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.lazy import lazy
from qvgen.quant.scheme import QuantArgs, QuantScheme
from qvgen.quant.search.settings import SearchSettings

if TYPE_CHECKING:
    from qvgen.quant.fake_quantizer import ActivationQuantizer, WeightQuantizer
    from qvgen.quant.grid import LayerError, LayerGrid, layer_error
    from qvgen.quant.primitives import dequantize, fake_quantize
    from qvgen.quant.search.mse import search_grid

__all__ = [
    "ActivationQuantizer",
    "LayerError",
    "LayerGrid",
    "QuantArgs",
    "QuantScheme",
    "SearchSettings",
    "WeightQuantizer",
    "dequantize",
    "fake_quantize",
    "layer_error",
    "search_grid",
]

__getattr__ = lazy(
    {
        **dict.fromkeys(("ActivationQuantizer", "WeightQuantizer"), "qvgen.quant.fake_quantizer"),
        **dict.fromkeys(("LayerError", "LayerGrid", "layer_error"), "qvgen.quant.grid"),
        **dict.fromkeys(("dequantize", "fake_quantize"), "qvgen.quant.primitives"),
        "search_grid": "qvgen.quant.search.mse",
    }
)
