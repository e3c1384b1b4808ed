"""qvgen: auxiliary modules Φ and rank decay (QVGen, arXiv 2505.11497).

Y = (Q(W) + L diag(γ) R) Q(X) with L R the best rank-r part of W - Q(W) at the start; loss |student - teacher|^2. In every
phase the last λ r directions are scaled by u, which falls from 1 to 0, and are cut; the rest is decomposed anew, until
nothing is left of Φ. Deviations, each with its reason: docs/method.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.methods.method import Method, PhiSettings, Quantize
from qvgen.phi.rank_decay import RankDecaySchedule

if TYPE_CHECKING:
    import torch
    from torch import nn


class QVGen(Method):
    def schedule(self, with_phi: RankDecaySchedule) -> RankDecaySchedule:
        if with_phi.initial_rank == 0:
            raise ValueError(f"method {self.name} needs decay.initial_rank >= 1; without Φ the method is called kd")
        return with_phi

    def prepare_(self, student: nn.Module, quantize_: Quantize, phi: PhiSettings, generator: torch.Generator) -> None:
        from qvgen.nn.swap import add_phi_

        quantize_(student)
        add_phi_(student, phi.initial_rank, generator if phi.initialization == "zero" else None)


METHOD = QVGen("qvgen")
