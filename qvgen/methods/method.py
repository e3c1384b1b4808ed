"""The interface of a method: a card with a few facts, and hooks that calibration and training call.

Params, recipe and stages read the facts and call the hooks; none of them asks which method it is. The defaults are those of
`kd`, plain training of all parts towards the teacher, so a card holds what its method does otherwise.

params.yaml is read with these cards, which must not take seconds: PyTorch is imported inside a hook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from qvgen.phi.rank_decay import RankDecaySchedule

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qvgen.models.family import Family
    from qvgen.quant.grid import LayerGrid
    from qvgen.quant.scheme import QuantScheme
    from qvgen.quant.search.settings import SearchSettings

Quantize = Callable[["nn.Module"], None]  # changes a model in place
Teacher = Callable[[], "torch.Tensor"]


class PhiSettings(Protocol):
    """The settings of section `decay` of params.yaml that a card reads."""

    @property
    def initial_rank(self) -> int: ...

    @property
    def initialization(self) -> str: ...


@dataclass(frozen=True)
class Method:
    """A method, as params.yaml names it."""

    name: str
    extras: Mapping[str, Any] = field(default_factory=dict)  # what it adds to a layer: fields of QuantScheme, with defaults
    trained: bool = True
    guidance_stop: float = 1.0  # cleanness (1 - t / 1000) from which sampling goes on without guidance

    @property
    def zero_inference_cost(self) -> bool:
        """Whether the packed model computes nothing besides its quantized layers."""
        return not self.extras

    # Calibration

    def channel_grid(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Shift and scale (K,) of an input, from recorded rows (M, K), to be folded into the steps before it where that is
        free (qvgen/models/folding.py). None: inputs stay as they are."""
        return None

    def search(
        self, weight: torch.Tensor, inputs: list[torch.Tensor], scheme: QuantScheme, settings: SearchSettings
    ) -> LayerGrid:
        """Grid of a layer's weight (N, K), from recorded rows (m, K) of its (folded) inputs per timestep group."""
        from qvgen.quant.search.mse import search_grid

        return search_grid(weight, inputs, scheme, settings)

    @property
    def searches_plainly(self) -> bool:
        """Whether its grids are those of `mse`."""
        return type(self).search is Method.search and type(self).channel_grid is Method.channel_grid

    @property
    def finishes_whole(self) -> bool:
        """Whether `finish_` changes the trained student."""
        return type(self).finish_ is not Method.finish_

    # Training

    def schedule(self, with_phi: RankDecaySchedule) -> RankDecaySchedule:
        """The steps of training. Without Φ they are as many as with it; without training there are none."""
        if not self.trained:
            return RankDecaySchedule(initial_rank=0)
        hold = with_phi.hold_steps
        return RankDecaySchedule(initial_rank=0, hold_steps=hold, final_steps=with_phi.total_steps - hold)

    def prepare_(self, student: nn.Module, quantize_: Quantize, phi: PhiSettings, generator: torch.Generator) -> None:
        """Make the full-precision `student` the one that trains. `quantize_(student)` folds its inputs and turns its layers
        into QATLinear on the calibrated grids; `generator` is seeded with the seed of the run."""
        quantize_(student)

    def caption_dropout(self, given: float) -> float:
        """Share of prompts that are replaced by the empty one; `given` is that of params.yaml."""
        return given

    def timesteps(self, family: Family, n: int, generator: torch.Generator) -> torch.Tensor:
        """Timesteps (n,) float32 of a batch, by default drawn independently, as the model was trained."""
        return family.sample_timesteps(n, generator)

    def loss(self, student: torch.Tensor, teacher: Teacher, target: torch.Tensor, cleanness: torch.Tensor) -> torch.Tensor:
        """Scalar loss of the student's prediction (n, ...), by default |student - teacher|^2 (QVGen, section 3.1).

        `teacher()` runs the full-precision model on the same input, without gradient. `target` is what the model itself was
        trained to predict (noise - clean for flow matching, v for CogVideoX). `cleanness` (n,) is 0 at pure noise, 1 at clean
        data.
        """
        return (student - teacher()).square().mean()

    def finish_(self, student: nn.Module, quantize_: Quantize) -> None:
        """Turn the trained student, without Φ, into one that `convert_` can pack. `quantize_(student)` calibrates the student
        itself and turns its layers into QATLinear."""
