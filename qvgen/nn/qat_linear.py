"""A linear layer in training: fake quantizers for its weight and input, and Φ, an adapter, or neither."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qvgen.nn.adapter import LowRankAdapter
from qvgen.nn.input_transform import InputTransform
from qvgen.nn.timestep import group_of
from qvgen.phi.auxiliary import AuxiliaryModule
from qvgen.quant.fake_quantizer import ActivationQuantizer, WeightQuantizer
from qvgen.quant.scheme import QuantScheme


class QATLinear(nn.Linear):
    """nn.Linear that computes Y = (Q(W + adapter) + Φ) Q(X) + b. `weight` and `bias` keep their names, so full-precision
    checkpoints load unchanged.

    With an `input_transform` X is the transformed input, `weight` what that leaves to be packed, and a branch may be added
    (nn/input_transform.py).
    """

    def __init__(
        self,
        linear: nn.Linear,
        scheme: QuantScheme,
        weight_quantizer: WeightQuantizer,
        input_quantizer: ActivationQuantizer | None,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scheme = scheme
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self.phi: AuxiliaryModule | None = None
        self.adapter: LowRankAdapter | None = None
        self.input_transform: InputTransform | None = None

    def add_phi(self, rank: int, zero: torch.Generator | None = None) -> None:
        """Attach Φ, initialised from this layer's weight error, or at zero with a generator for its random half; `rank` is
        cut to what the layer's shape allows."""
        rank = min(rank, *self.weight.shape)
        if zero is not None:
            self.phi = AuxiliaryModule.from_zero(self.weight, rank, zero)
            return
        error = self.weight.detach() - self.weight_quantizer.dequantized(self.weight)
        self.phi = AuxiliaryModule.from_weight_error(error, rank)

    def add_adapter(self, generator: torch.Generator) -> None:
        """Attach an adapter; it is trained instead of the weight."""
        step, _ = self.weight_quantizer.export()
        self.adapter = LowRankAdapter(step.mean(1, keepdim=True).expand(self.out_features, 1), self.in_features, generator)

    @torch.no_grad()
    def merge_adapter(self) -> None:
        """Add the adapter to the weight and drop it: the layer computes what it did."""
        if self.adapter is not None:
            self.weight += self.adapter.delta()
            self.adapter = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight_quantizer(self.weight if self.adapter is None else self.weight + self.adapter.delta())
        if self.phi is not None:
            weight = weight + self.phi.delta()
        if self.input_transform is not None:
            x = self.input_transform(x)
        quantized = x
        if self.input_quantizer is not None:
            quantized = self.input_quantizer(x, group_of(x, self.scheme.timestep_groups))
        y = F.linear(quantized, weight, self.bias)
        return y if self.input_transform is None else self.input_transform.add_branch(y, x)
