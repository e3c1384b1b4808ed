"""efficientdm: quantization-aware low-rank adapters (EfficientDM, arXiv 2310.03270).

Weights stay frozen; W' = Q(W + s B A), B = 0 and A random at the start, rank max(1, min(N, K) / 16), is merged into W at
the end, so that nothing is left at inference. Loss: |student - teacher|^2, no labels needed. Scales, zero points and the
clips of each timestep group are learned (its temporal LSQ: one set of activation steps for each denoising step).

Deviations: *scale-aware* means here that the adapter's product is multiplied by the step s of its channel, so that equal
updates move the weights of every channel by equal numbers of steps; the paper scales gradients, which Adam would undo.
Activations have a dynamic range per token, so clips are learned instead of steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.methods.method import Method, PhiSettings, Quantize

if TYPE_CHECKING:
    import torch
    from torch import nn


class EfficientDM(Method):
    def prepare_(self, student: nn.Module, quantize_: Quantize, phi: PhiSettings, generator: torch.Generator) -> None:
        from qvgen.nn.swap import add_adapters_

        quantize_(student)
        add_adapters_(student, generator)

    def finish_(self, student: nn.Module, quantize_: Quantize) -> None:
        from qvgen.nn.swap import merge_adapters_

        merge_adapters_(student)


METHOD = EfficientDM("efficientdm")
