"""qdm: timestep-aware smoothing of inputs, then training towards the teacher (Q-DM, NeurIPS 2023).

Loss: |student - teacher|^2, its noise-estimating mimicking. Steps of the weights are learned, zero points stay. Equations of
the smoothing, and what differs from the paper: qvgen/quant/search/qdm.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.methods.method import Method, PhiSettings, Quantize

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qvgen.quant.grid import LayerGrid
    from qvgen.quant.scheme import QuantScheme
    from qvgen.quant.search.settings import SearchSettings


class QDM(Method):
    def search(
        self, weight: torch.Tensor, inputs: list[torch.Tensor], scheme: QuantScheme, settings: SearchSettings
    ) -> LayerGrid:
        from qvgen.quant.search.qdm import search_grid

        return search_grid(weight, inputs, scheme, settings)

    def prepare_(self, student: nn.Module, quantize_: Quantize, phi: PhiSettings, generator: torch.Generator) -> None:
        from qvgen.nn.swap import freeze_zero_points_

        quantize_(student)
        freeze_zero_points_(student)


METHOD = QDM("qdm", extras={"input_scaling": True})
