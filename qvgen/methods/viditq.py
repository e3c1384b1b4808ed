"""viditq: static-dynamic channel balance, inputs scaled and then rotated (ViDiT-Q, arXiv 2406.02540); not trained.

Equations, and what differs from the paper: qvgen/quant/search/viditq.py. The rotation's 128 divides the widths of all
published models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.methods.method import Method

if TYPE_CHECKING:
    import torch

    from qvgen.quant.grid import LayerGrid
    from qvgen.quant.scheme import QuantScheme
    from qvgen.quant.search.settings import SearchSettings


class ViDiTQ(Method):
    def search(
        self, weight: torch.Tensor, inputs: list[torch.Tensor], scheme: QuantScheme, settings: SearchSettings
    ) -> LayerGrid:
        from qvgen.quant.search.viditq import search_grid

        return search_grid(weight, inputs, scheme, settings)


METHOD = ViDiTQ("viditq", extras={"input_scaling": True, "input_rotation": 128}, trained=False)
