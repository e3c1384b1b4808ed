"""A linear layer as deployed: packed weights, quantized inputs, one op call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import nn

from qvgen.kernels import gradient
from qvgen.kernels.linear_ops import INPUT_DTYPES, quantized_linear, quantized_linear_out
from qvgen.kernels.registry import (
    Arguments,
    KernelPreference,
    LayerTensors,
    PackedWeight,
    PreparedWeight,
    choose,
    get,
)
from qvgen.nn.input_transform import low_rank_output, write_output
from qvgen.nn.timestep import group_of
from qvgen.packing import layout
from qvgen.packing.bits import pack, unpack
from qvgen.packing.layout import layer_layout, row_sums, validate_layer, weight_groups
from qvgen.quant.fake_quantizer import grouped_weight
from qvgen.quant.primitives import dequantize
from qvgen.quant.scheme import QuantScheme
from qvgen.quant.smoothing import transform_input

_preparing = threading.Lock()


class PackedLinear(nn.Module):
    """Y = Q(W) Q(X) + b in integer arithmetic (kernels/linear_ops.py). Nothing in it is trained; gradients pass through it
    (kernels/gradient.py).

    The buffers are the tensors of the packed format (packing/layout.py). They keep their dtypes whatever the module is cast
    to; only its parameters, `bias` and low-rank factors, follow. On first use, or by `prepare_backend`, the weight is
    repacked as the kernel backend reads it. From then on there is no other copy: `weight_packed`, and with it the state dict,
    is made from it when asked for. What a scheme adds to a layer (nn/input_transform.py) runs in PyTorch around the op.
    """

    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    weight_row_sum: torch.Tensor
    weight_shape: torch.Tensor
    input_clip_lower: torch.Tensor | None
    input_clip_upper: torch.Tensor | None
    input_scale: torch.Tensor | None
    bias: nn.Parameter | None
    low_rank_up: nn.Parameter | None
    low_rank_down: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: QuantScheme,
        device: torch.device | str | None = "meta",
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer, for loading into; `dtype` is that of the bias and the low-rank factors."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme = scheme
        self.has_extras = bool(scheme.extras)
        dtype = dtype or torch.get_default_dtype()
        for name, spec in layer_layout(in_features, out_features, scheme, bias, dtype).items():
            empty = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            if name in layout.CAST_NAMES:
                # Parameters, because models ask their layers' parameters for the dtype to compute in.
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
            else:
                self.register_buffer(name, empty)
        for name in (layout.ZERO_POINT, layout.CLIP_LOWER, layout.CLIP_UPPER, layout.INPUT_SCALE):
            if name not in self._buffers:
                self.register_buffer(name, None)
        for name in layout.CAST_NAMES:
            if name not in self._parameters:
                self.register_parameter(name, None)
        self._prepared: PreparedWeight | None = None

    @property
    def weight_packed(self) -> torch.Tensor:
        """Words (N, ceil(K num_bits / 32)) int32; once a backend has the weight, a copy made for the caller."""
        if layout.PACKED not in self._buffers:  # before it is registered, when torch asks whether the name is free
            raise AttributeError(layout.PACKED)
        stored = self._buffers[layout.PACKED]
        return self._stored_words() if stored is None else stored

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
        **extras: torch.Tensor | None,
    ) -> Self:
        """A packed layer from the codes and grids that training exports.

        codes (N, K) uint8; scale and zero_point (rows, G) float32, where rows is N, or 1 for strategy tensor, and zero_point
        is None if symmetric; clips (timestep groups,) float32 in [0, 1], None if inputs are not quantized; bias (N,) of any
        float dtype; `extras` by their names in the format. Raises ValueError if they do not fit each other or the scheme.
        """
        n, k = codes.shape
        packed = cls(k, n, bias is not None, scheme)
        tensors = {
            layout.PACKED: pack(codes, scheme.weights.num_bits),
            layout.SCALE: scale,
            layout.ZERO_POINT: zero_point,
            layout.ROW_SUM: row_sums(codes, weight_groups(k, scheme.weights)),
            layout.SHAPE: torch.tensor([n, k], device=codes.device),
            layout.CLIP_LOWER: clip_lower,
            layout.CLIP_UPPER: clip_upper,
            layout.BIAS: bias,
            **extras,
        }
        given = {name: value.detach().contiguous() for name, value in tensors.items() if value is not None}
        validate_layer("(new)", given, k, n, scheme, bias is not None, check_codes=False)
        for name, tensor in given.items():  # not by loading, which would add up the codes that were summed here
            if name in layout.CAST_NAMES:
                packed._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            else:
                packed._buffers[name] = tensor
        return packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, ..., K) float32, bfloat16 or float16 to (n, ..., N) in the same."""
        self._check_input(x)
        if self.has_extras:
            return self._with_extras(x).to(x.dtype)
        return self._linear(x)

    def forward_into(self, x: torch.Tensor, out: torch.Tensor, gelu: bool = False) -> None:
        """Write the output, after a GELU if asked for, to `out` (n, ..., N): contiguous, float32 or bfloat16."""
        self._check_input(x)
        tensors = self._tensors()
        if gradient.is_asked_for(x, [tensors]):
            raise RuntimeError("forward_into has no gradient: call the layer, or use torch.no_grad()")
        if self.has_extras:
            write_output(self._with_extras(x), out, gelu)
        else:
            quantized_linear_out(x, *tensors, *self._arguments(x), out, gelu)

    def _linear(self, x: torch.Tensor) -> torch.Tensor:
        tensors = self._tensors()
        if gradient.is_asked_for(x, [tensors]):
            return gradient.linear(x, tensors, self._arguments(x), self.scheme.input_activations)
        return quantized_linear(x, *tensors, *self._arguments(x), False, None)

    def _with_extras(self, x: torch.Tensor) -> torch.Tensor:
        """(n, ..., N) float32; the transformed input is float32 too, whatever the model's dtype, as in training."""
        if x.dtype not in INPUT_DTYPES:
            raise ValueError(f"input must be float32, bfloat16 or float16, not {x.dtype}")
        x = transform_input(x.float(), self.input_scale, self.scheme.input_rotation)
        y = self._linear(x)
        if self.low_rank_up is not None and self.low_rank_down is not None:
            y = y + low_rank_output(x, self.low_rank_up, self.low_rank_down)
        return y

    def _check_input(self, x: torch.Tensor) -> None:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input has {x.shape[-1]} features, this layer takes {self.in_features}")
        scale = self._buffers[layout.SCALE]
        prepared = None if torch.compiler.is_compiling() else self._prepared  # a trace would not look at it again
        if prepared and scale is not None and prepared.weight.device != scale.device == x.device:
            self._buffers[layout.PACKED], self._prepared = self._stored_words().to(x.device), None  # offloading moved the rest
        self._ensure_prepared()

    def _tensors(self) -> LayerTensors:
        prepared, buffers = self._prepared, self._buffers  # not by name: looking for an attribute of a module takes 2 us
        assert prepared is not None
        _, weight, scale, zero_point, row_sum = prepared
        clips = buffers[layout.CLIP_LOWER], buffers[layout.CLIP_UPPER]
        return LayerTensors(weight, scale, zero_point, row_sum, *clips, self._parameters[layout.BIAS])

    def _arguments(self, x: torch.Tensor) -> Arguments:
        activations, prepared = self.scheme.input_activations, self._prepared
        assert prepared is not None
        return Arguments(
            None if activations is None else group_of(x, self.scheme.timestep_groups),
            self.scheme.weights.num_bits,
            None if activations is None else activations.num_bits,
            activations is not None and activations.symmetric,
            prepared.backend,
        )

    def prepare_backend(self, preference: KernelPreference | None = None) -> PreparedWeight:
        """Choose the kernel backend and repack the weight for it; by default what QVGEN_KERNELS asks for.

        Raises RuntimeError if a backend asked for by name cannot run this layer.
        """
        tensors = self.weight_packed, self.weight_scale, self.weight_zero_point, self.weight_row_sum
        weight = PackedWeight(*tensors, self.in_features, self.scheme.weights, self.scheme.input_activations)
        self._prepared = choose(weight, preference).prepare(weight)
        self._buffers[layout.PACKED] = None
        return self._prepared

    def _stored_words(self) -> torch.Tensor:
        prepared = self._prepared
        assert prepared is not None
        return get(prepared.backend).stored_words(prepared, self.in_features, self.scheme.weights.num_bits)

    def _store_words(self) -> None:
        """Undo `prepare_backend`: the layer keeps its stored words again."""
        if self._prepared is not None:
            self._buffers[layout.PACKED] = self._stored_words()
            self._prepared = None

    def __getstate__(self) -> dict[str, Any]:
        # For pickle, torch.save and copies: words as stored. What a backend prepared lies aligned for it in this process, and
        # another machine may not have that backend.
        if self._prepared is None:
            return self.__dict__.copy()
        return self.__dict__ | {"_buffers": {**self._buffers, layout.PACKED: self._stored_words()}, "_prepared": None}

    @torch.compiler.assume_constant_result
    def _ensure_prepared(self) -> None:
        # The decorator: torch.compile runs this while it traces instead of tracing it, so that a model compiled before its
        # first call neither breaks its graph here nor repacks in it.
        if self._prepared is None:
            with _preparing:  # threads that make the first call together
                if self._prepared is None:
                    self.prepare_backend()

    @property
    def backend(self) -> str | None:
        """Name of the kernel backend; None before it was chosen."""
        return None if self._prepared is None else self._prepared.backend

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight in the dtype of the bias, made anew each time: other libraries ask a linear layer's weight
        for its shape, dtype and device. Writing to it changes nothing."""
        return self.dequantize().to(torch.float32 if self.bias is None else self.bias.dtype)

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
        tensors[layout.PACKED] = self.weight_packed
        validate_layer(name, tensors, self.in_features, self.out_features, self.scheme, self.bias is not None)

    def extra_repr(self) -> str:
        weights = self.scheme.weights
        kind = "symmetric" if weights.symmetric else "asymmetric"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{', '.join([self.scheme.name, kind, weights.strategy, *self.scheme.extras])}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # What Module.to(dtype), .half(), .bfloat16() do to floating-point tensors must not reach the grid: a scale
        # rounded to bfloat16 is another scale. What moves to another device leaves the backend of this one.
        if fn(self.weight_shape).device != self.weight_shape.device:
            self._store_words()
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + layout.PACKED] = self.weight_packed

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._store_words()
        own = self.weight_packed, self.weight_row_sum
        if fault := layout.fault_of_loading(state_dict, prefix, own, self.in_features, self.scheme.weights):
            args[-1].append(fault)
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Names and packed layers of a model, in its order; one that stands in several places once, by the first name."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module
