"""Implementations of one linear layer, y = x W^T + b, each as the library that has it wants to be called.

    packed        this project's op, quantized_linear_out: bfloat16 in and out, inputs quantized inside
    torch_fp32    torch.addmm in float32
    torch_bf16    torch.addmm in bfloat16
    torch_bf16_prepacked   the same with the weight in oneDNN's own order, as inductor's freezing makes it
    onednn_int8   PyTorch's dynamically quantized linear on oneDNN: 8-bit weights and inputs, float32 in and out
    int4pack      PyTorch's weight-only 4 bits: bfloat16 in and out, groups of 128 (32 where K is no multiple); it has no bias
    torchao       8-bit weights and inputs, compiled by inductor, its released path on CPUs: bfloat16 in and out

A variant prepares the weight once and then makes any number of copies of the layer; a copy is called without arguments, on
the problem's own input, and returns y (M, N). What can be written into a buffer given beforehand, is.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qvgen.kernels.linear_ops import quantized_linear_out
from qvgen.nn.packed_linear import PackedLinear
from qvgen.quant.fake_quantizer import WeightQuantizer
from qvgen.quant.scheme import QuantArgs, QuantScheme

Action = Callable[[], Tensor]
MakeCopy = Callable[[], Action]


class Unavailable(Exception):  # noqa: N818  a reason to report, not an error
    """This variant does not exist here; the message says why."""


@dataclass(frozen=True)
class Problem:
    """x (M, K), weight (N, K), bias (N,), all float32."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    weight_bits: int
    activation_bits: int

    @classmethod
    def random(cls, m: int, k: int, n: int, weight_bits: int = 4, activation_bits: int = 4) -> Problem:
        generator = torch.Generator().manual_seed(0)
        x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k), (n,)))
        return cls(x, weight / k**0.5, bias, weight_bits, activation_bits)


def packed_layer(p: Problem) -> Callable[[], PackedLinear]:
    """A function that makes copies of the packed layer, prepared for the backend that QVGEN_KERNELS asks for."""
    scheme = QuantScheme(
        weights=QuantArgs(num_bits=p.weight_bits, zero_point_domain="float"),
        input_activations=QuantArgs(num_bits=p.activation_bits, strategy="token"),
        timestep_groups=1,
    )
    quantizer = WeightQuantizer.min_max(scheme.weights, p.weight)
    codes, (scale, zero_point), clip = quantizer.codes(p.weight), quantizer.export(), torch.ones(1)

    def make() -> PackedLinear:
        bias = p.bias.bfloat16()
        layer = PackedLinear.from_codes(codes, scale, zero_point, clip, clip, bias, scheme)
        layer.prepare_backend()
        return layer

    return make


def packed(p: Problem) -> MakeCopy:
    make_layer, x, out = packed_layer(p), p.x.bfloat16().unsqueeze(0), torch.empty(1, len(p.x), len(p.weight)).bfloat16()
    group = torch.zeros(1, dtype=torch.int64)

    def make() -> Action:
        layer = make_layer()
        backend, *prepared = layer.prepare_backend()
        clips = layer.input_clip_lower, layer.input_clip_upper
        arguments = (*prepared, *clips, layer.bias, group, p.weight_bits, p.activation_bits, False, backend, out, False)

        def call() -> Tensor:
            quantized_linear_out(x, *arguments)
            return out[0]

        return call

    return make


def torch_fp32(p: Problem) -> MakeCopy:
    return _addmm(p, torch.float32)


def torch_bf16(p: Problem) -> MakeCopy:
    return _addmm(p, torch.bfloat16)


def _addmm(p: Problem, dtype: torch.dtype) -> MakeCopy:
    x, bias, out = p.x.to(dtype), p.bias.to(dtype), torch.empty(len(p.x), len(p.weight), dtype=dtype)

    def make() -> Action:
        weight = p.weight.to(dtype, copy=True)
        return lambda: torch.addmm(bias, x, weight.t(), out=out)

    return make


def torch_bf16_prepacked(p: Problem) -> MakeCopy:
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise Unavailable("this PyTorch or processor has no oneDNN in bfloat16")
    x, bias = p.x.bfloat16(), p.bias.bfloat16()

    def make() -> Action:
        weight = torch.ops.mkldnn._reorder_linear_weight(p.weight.bfloat16(), len(p.x))
        return lambda: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    return make


def onednn_int8(p: Problem) -> MakeCopy:
    if "onednn" not in torch.backends.quantized.supported_engines:
        raise Unavailable("this PyTorch has no oneDNN")
    scale = p.weight.abs().amax(1).double() / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, with nothing else yet that computes this
        weight = torch.quantize_per_channel(p.weight, scale, torch.zeros(len(scale), dtype=torch.int64), 0, torch.qint8)

    def make() -> Action:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = "onednn"  # chosen while packing, and kept by what was packed
        try:
            layer = torch.ops.quantized.linear_prepack(weight, p.bias)
        finally:
            torch.backends.quantized.engine = before
        # reduce_range: 7 bits, for processors whose 8-bit products overflow 16 bits. oneDNN takes as long with it.
        return lambda: torch.ops.quantized.linear_dynamic(p.x, layer, reduce_range=False)

    return make


def int4pack(p: Problem) -> MakeCopy:
    group = 128 if p.weight.shape[1] % 128 == 0 else 32
    if p.weight.shape[1] % group or len(p.weight) % 16:
        raise Unavailable("it wants K in groups of 32 and N in groups of 16")
    grouped = p.weight.unflatten(1, (-1, group))
    lower, upper = grouped.amin(-1), grouped.amax(-1)
    scale = (upper - lower) / 15  # w = (code - 8) scale + zero
    codes = ((grouped - lower.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, 15).to(torch.int32).flatten(1)
    grid = torch.stack((scale, lower + 8 * scale), -1).transpose(0, 1).bfloat16().contiguous()  # (K / group, N, 2)
    x = p.x.bfloat16()

    def make() -> Action:
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group, grid)

    return make


def torchao(p: Problem) -> MakeCopy:
    if importlib.util.find_spec("torchao") is None:
        raise Unavailable("it is not installed")
    from torchao.quantization import (  # type: ignore[import-not-found]
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    torch.compiler.reset()  # or the second shape is compiled for all shapes
    linear, x = torch.compile(F.linear, dynamic=False), p.x.bfloat16()

    def make() -> Action:
        n, k = p.weight.shape
        module = torch.nn.Linear(k, n).bfloat16().requires_grad_(False)
        module.weight.copy_(p.weight)
        module.bias.copy_(p.bias)
        quantize_(module, Int8DynamicActivationInt8WeightConfig())
        weight, bias = module.weight, module.bias
        return lambda: linear(x, weight, bias)

    return make


OURS = "packed"
# Name -> what makes it and its bits per weight (of the packed layer: the problem's).
VARIANTS: dict[str, tuple[Callable[[Problem], MakeCopy], int | None]] = {
    OURS: (packed, None),
    "torch_fp32": (torch_fp32, 32),
    "torch_bf16": (torch_bf16, 16),
    "torch_bf16_prepacked": (torch_bf16_prepacked, 16),
    "onednn_int8": (onednn_int8, 8),
    "int4pack": (int4pack, 4),
    "torchao": (torchao, 8),
}
