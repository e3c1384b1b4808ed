"""A linear layer as deployed: packed weights, quantized inputs, one op call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import nn

from qvgen.kernels.ops import quantized_linear
from qvgen.kernels.registry import KernelPreference, PackedWeight, PreparedWeight, choose
from qvgen.nn.timestep import TimestepState
from qvgen.packing import layout
from qvgen.packing.bits import pack, unpack
from qvgen.packing.layout import layer_layout, row_sums, validate_layer, weight_groups
from qvgen.quant.fake_quantizer import grouped_weight
from qvgen.quant.primitives import dequantize
from qvgen.quant.scheme import QuantScheme


class PackedLinear(nn.Module):
    """Y = Q(W) Q(X) + b in integer arithmetic (kernels/ops.py), for inference only.

    The buffers are the tensors of the packed format (packing/layout.py). They keep their dtypes whatever the module is cast
    to; only `bias` follows. The copy of the weight that the kernel backend reads is made on first use, or by
    `prepare_backend`, and is not part of the state dict.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    weight_row_sum: torch.Tensor
    weight_shape: torch.Tensor
    input_clip_lower: torch.Tensor | None
    input_clip_upper: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: QuantScheme,
        timestep: TimestepState,
        device: torch.device | str | None = "meta",
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer, for loading into; `dtype` is that of the bias."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme = scheme
        self.timestep = timestep
        dtype = dtype or torch.get_default_dtype()
        for name, spec in layer_layout(in_features, out_features, scheme, bias, dtype).items():
            empty = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            if name == layout.BIAS:
                # A parameter, because models ask their layers' parameters for the dtype to compute in.
                self.bias = nn.Parameter(empty, requires_grad=False)
            else:
                self.register_buffer(name, empty)
        for name in (layout.ZERO_POINT, layout.CLIP_LOWER, layout.CLIP_UPPER):
            if name not in self._buffers:
                self.register_buffer(name, None)
        if not bias:
            self.register_parameter("bias", None)
        self._prepared: PreparedWeight | None = None

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        clip_lower: torch.Tensor | None,
        clip_upper: torch.Tensor | None,
        bias: torch.Tensor | None,
        scheme: QuantScheme,
        timestep: TimestepState,
    ) -> Self:
        """A layer from what training exports.

        codes (N, K) uint8; scale and zero_point (rows, G) float32, where rows is N, or 1 for strategy tensor, and
        zero_point is None if symmetric; clips (timestep groups,) float32 in [0, 1], None if inputs are not quantized; bias
        (N,) of any float dtype. Raises ValueError if they do not fit each other or the scheme.
        """
        n, k = codes.shape
        packed = cls(k, n, bias is not None, scheme, timestep)
        tensors = {
            layout.PACKED: pack(codes, scheme.weights.num_bits),
            layout.SCALE: scale,
            layout.ZERO_POINT: zero_point,
            layout.ROW_SUM: row_sums(codes, weight_groups(k, scheme.weights)),
            layout.SHAPE: torch.tensor([n, k], device=codes.device),
            layout.CLIP_LOWER: clip_lower,
            layout.CLIP_UPPER: clip_upper,
            layout.BIAS: bias,
        }
        given = {name: value.detach().contiguous() for name, value in tensors.items() if value is not None}
        validate_layer("(new)", given, k, n, scheme, bias is not None, check_codes=False)
        packed.load_state_dict(given, assign=True)
        return packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, ..., K) in any float dtype to (n, ..., N) in the same."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input has {x.shape[-1]} features, this layer takes {self.in_features}")
        self._ensure_prepared()
        prepared = self._prepared
        assert prepared is not None
        activations = self.scheme.input_activations
        return quantized_linear(
            x,
            prepared.weight,
            prepared.scale,
            prepared.zero_point,
            prepared.row_sum,
            self.input_clip_lower,
            self.input_clip_upper,
            self.bias,
            None if activations is None else self.timestep.of(x),
            self.scheme.weights.num_bits,
            None if activations is None else activations.num_bits,
            activations is not None and activations.symmetric,
            prepared.backend,
            False,
            None,
        )

    def prepare_backend(self, preference: KernelPreference | None = None) -> PreparedWeight:
        """Choose the kernel backend and repack the weight for it; by default what QVGEN_KERNELS asks for.

        Raises RuntimeError if a backend asked for by name cannot run this layer.
        """
        weight = PackedWeight(
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.weight_row_sum,
            self.in_features,
            self.scheme.weights,
            self.scheme.input_activations,
        )
        self._prepared = choose(weight, preference).prepare(weight)
        return self._prepared

    @torch.compiler.assume_constant_result
    def _ensure_prepared(self) -> None:
        # The decorator: torch.compile runs this while it traces instead of tracing it, so that a model compiled before its
        # first call neither breaks its graph here nor repacks in it.
        prepared = self._prepared
        if prepared is None or prepared.weight.device != self.weight_packed.device:
            self.prepare_backend()

    @property
    def backend(self) -> str | None:
        """Name of the kernel backend; None before it was chosen."""
        return None if self._prepared is None else self._prepared.backend

    def dequantize(self) -> torch.Tensor:
        """The weight (N, K) float32, equal bit for bit to the fake-quantized weight of training."""
        args = self.scheme.weights
        codes = unpack(self.weight_packed, args.num_bits, self.in_features)
        scale, zero_point = self.weight_scale, self.weight_zero_point
        if zero_point is None:
            zero_point = torch.full_like(scale, args.symmetric_zero_point)
        values = dequantize(grouped_weight(codes, args), scale.unsqueeze(-1), zero_point.unsqueeze(-1))
        return values.view(self.out_features, self.in_features)

    def validate(self, name: str) -> None:
        """Raise ValueError, with `name` in it, unless the tensors are a consistent packed layer."""
        tensors = dict(self.named_buffers(recurse=False)) | dict(self.named_parameters(recurse=False))
        validate_layer(name, tensors, self.in_features, self.out_features, self.scheme, self.bias is not None)

    def extra_repr(self) -> str:
        weights = self.scheme.weights
        kind = "symmetric" if weights.symmetric else "asymmetric"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme.name}, {kind}, {weights.strategy}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # What Module.to(dtype), .half(), .bfloat16() do to floating-point tensors must not reach the grid: a scale
        # rounded to bfloat16 is another scale.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        if self._buffers[layout.PACKED] is not before[layout.PACKED]:
            self._prepared = None
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._prepared = None


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Names and packed layers of a model, in its order."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module
