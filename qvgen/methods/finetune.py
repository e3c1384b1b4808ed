"""finetune: the full-precision model trained for the same steps on the same clips, then quantized as `mse` does.

Is the gain of quantization-aware training just training? Loss: |model - target|^2. Nothing is quantized while it trains; the
grids are searched afterwards on the tuned model's own inputs, with the settings of stage calibrate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.methods.method import Method, PhiSettings, Quantize, Teacher

if TYPE_CHECKING:
    import torch
    from torch import nn


class Finetune(Method):
    def prepare_(self, student: nn.Module, quantize_: Quantize, phi: PhiSettings, generator: torch.Generator) -> None:
        """Nothing: it trains in full precision."""

    def loss(self, student: torch.Tensor, teacher: Teacher, target: torch.Tensor, cleanness: torch.Tensor) -> torch.Tensor:
        return (student - target).square().mean()

    def finish_(self, student: nn.Module, quantize_: Quantize) -> None:
        quantize_(student)


METHOD = Finetune("finetune")
