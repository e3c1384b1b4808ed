"""The op behind every packed layer: one schema and one fake implementation for all backends.

    qvgen::quantized_linear(x, weight, ...) -> y

    x                    (n, ..., K) float32, bfloat16 or float16; n samples
    weight               the backend's own layout (registry.PreparedWeight)
    weight_scale         (N, G) float32
    weight_zero_point    (N, G) float32; none: symmetric
    weight_row_sum       (N, G) int32, sums of the weight's codes
    clip_lower, _upper   (timestep groups,) float32; none: inputs are not quantized
    timestep_group       (n,) or (1,) int64, the timestep group of each sample of x
    bias                 (N,), any float
    y                    (n, ..., N) in the dtype of x

The clips come whole, with an index per sample, so that a fused kernel looks them up itself instead of being preceded by two
gathers per layer. There is no gradient: packed layers are for inference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvgen.kernels import registry
from qvgen.kernels.reference import ReferenceBackend

registry.register(ReferenceBackend())

# torch.library.custom_op would read better, but costs 7 us more per call.
_library = torch.library.Library("qvgen", "DEF")
_library.define(
    f"{registry.OP}(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor weight_row_sum, "
    "Tensor? clip_lower, Tensor? clip_upper, Tensor? timestep_group, Tensor? bias, "
    "int weight_bits, int? activation_bits, bool activation_symmetric, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _run(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_row_sum: Tensor,
    clip_lower: Tensor | None,
    clip_upper: Tensor | None,
    timestep_group: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    activation_bits: int | None,
    activation_symmetric: bool,
    backend: str,
) -> Tensor:
    return registry.get(backend).run(
        x,
        weight,
        weight_scale,
        weight_zero_point,
        weight_row_sum,
        clip_lower,
        clip_upper,
        timestep_group,
        bias,
        weight_bits,
        activation_bits,
        activation_symmetric,
    )


def _fake(x: Tensor, weight: Tensor, weight_scale: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


_library.impl(registry.OP, _run, "CompositeExplicitAutograd")
torch.library.register_fake(f"qvgen::{registry.OP}", _fake, lib=_library)

quantized_linear = torch.ops.qvgen.quantized_linear.default
