"""rtn: round to nearest.

Weights: one grid per output channel over [min, max]; q = clamp(round(w / s + z), 0, P). Activations: the same per token at
run time, the whole range. Nothing is searched and nothing is trained: what any toolkit gives without calibration data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.methods.method import Method

if TYPE_CHECKING:
    import torch

    from qvgen.quant.grid import LayerGrid
    from qvgen.quant.scheme import QuantScheme
    from qvgen.quant.search.settings import SearchSettings


class RoundToNearest(Method):
    def search(
        self, weight: torch.Tensor, inputs: list[torch.Tensor], scheme: QuantScheme, settings: SearchSettings
    ) -> LayerGrid:
        from qvgen.quant.grid import LayerGrid

        return LayerGrid.min_max(weight, scheme)


METHOD = RoundToNearest("rtn", trained=False)
