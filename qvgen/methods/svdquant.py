"""svdquant: smoothing and a 16-bit low-rank branch beside the packed weight (SVDQuant, arXiv 2411.05007); not trained.

Equations, and what differs from the paper: qvgen/quant/search/svdquant.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.methods.method import Method

if TYPE_CHECKING:
    import torch

    from qvgen.quant.grid import LayerGrid
    from qvgen.quant.scheme import QuantScheme
    from qvgen.quant.search.settings import SearchSettings


class SVDQuant(Method):
    def search(
        self, weight: torch.Tensor, inputs: list[torch.Tensor], scheme: QuantScheme, settings: SearchSettings
    ) -> LayerGrid:
        from qvgen.quant.search.svdquant import search_grid

        return search_grid(weight, inputs, scheme, settings)


METHOD = SVDQuant("svdquant", extras={"input_scaling": True, "low_rank": 32}, trained=False)
