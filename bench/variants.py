"""Implementations of one linear layer, y = x W^T + b, each as the library that has it wants to be called.

    packed        this project's op, quantized_linear_out: bfloat16 in and out, inputs quantized inside
    torch_fp32    torch.addmm in float32
    torch_bf16    torch.addmm in bfloat16
    torch_bf16_prepacked   the same with the weight in oneDNN's own order, as inductor's freezing makes it
    onednn_int8   PyTorch's dynamically quantized linear on oneDNN: 8-bit weights and inputs, float32 in and out
    int4pack      PyTorch's weight-only 4 bits: bfloat16 in and out, groups of 128 (32 where K is no multiple); it has no bias
    torchao       8-bit weights and inputs, compiled by inductor, its released path on CPUs: bfloat16 in and out
    torchao_fp8   the same with both in e4m3, for each token and each output; on GPUs from sm_89 on
    int8_mm       torch._int_mm between a quantization of the tokens to 8 bits and the scales, compiled by inductor on GPUs

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
    def random(
        cls, m: int, k: int, n: int, weight_bits: int = 4, activation_bits: int = 4, device: torch.device | str = "cpu"
    ) -> Problem:
        generator = torch.Generator(device).manual_seed(0)
        shapes = (m, k), (n, k), (n,)
        x, weight, bias = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
        return cls(x, weight / k**0.5, bias, weight_bits, activation_bits)


def packed_layer(p: Problem) -> Callable[[], PackedLinear]:
    """A function that makes copies of the packed layer, prepared for the backend that QVGEN_KERNELS asks for."""
    scheme = QuantScheme(
        weights=QuantArgs(num_bits=p.weight_bits, zero_point_domain="float"),
        input_activations=QuantArgs(num_bits=p.activation_bits, strategy="token"),
        timestep_groups=1,
    )
    quantizer = WeightQuantizer.min_max(scheme.weights, p.weight)
    codes, (scale, zero_point), clip = quantizer.codes(p.weight), quantizer.export(), torch.ones(1, device=p.x.device)

    def make() -> PackedLinear:
        bias = p.bias.bfloat16()
        layer = PackedLinear.from_codes(codes, scale, zero_point, clip, clip, bias, scheme)
        layer.prepare_backend()
        return layer

    return make


def packed(p: Problem) -> MakeCopy:
    make_layer, x = packed_layer(p), p.x.bfloat16().unsqueeze(0)
    out = x.new_empty(1, len(p.x), len(p.weight))
    group = torch.zeros(1, dtype=torch.int64, device=x.device)

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
    x, bias, out = p.x.to(dtype), p.bias.to(dtype), p.x.new_empty((len(p.x), len(p.weight)), dtype=dtype)

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
    return _torchao(p, "Int8DynamicActivationInt8WeightConfig")


def torchao_fp8(p: Problem) -> MakeCopy:
    if not p.x.is_cuda or torch.cuda.get_device_capability(p.x.device) < (8, 9):
        raise Unavailable("there are no products in e4m3 before sm_89")
    return _torchao(p, "Float8DynamicActivationFloat8WeightConfig")


def _torchao(p: Problem, config: str) -> MakeCopy:
    if importlib.util.find_spec("torchao") is None:
        raise Unavailable("it is not installed")
    from torchao import quantization  # type: ignore[import-not-found]

    options = {"granularity": quantization.PerRow()} if config.startswith("Float8") else {}
    torch.compiler.reset()  # or the second shape is compiled for all shapes
    linear, x = torch.compile(F.linear, dynamic=False), p.x.bfloat16()

    def make() -> Action:
        n, k = p.weight.shape
        module = torch.nn.Linear(k, n, device=x.device).bfloat16().requires_grad_(False)
        module.weight.copy_(p.weight)
        module.bias.copy_(p.bias)
        quantization.quantize_(module, getattr(quantization, config)(**options))
        weight, bias = module.weight, module.bias
        return lambda: linear(x, weight, bias)

    return make


def int8_mm(p: Problem) -> MakeCopy:
    """8-bit symmetric weights and inputs, a scale for each token and each output."""
    if p.x.is_cuda and len(p.x) <= 16:
        raise Unavailable("torch._int_mm wants more than 16 rows on a GPU")
    x, bias = p.x.bfloat16(), p.bias.bfloat16()
    if p.x.is_cuda:
        torch.compiler.reset()
    call = torch.compile(_int8_linear, dynamic=False) if p.x.is_cuda else _int8_linear

    def make() -> Action:
        scale = p.weight.abs().amax(1, keepdim=True) / 127
        weight = (p.weight / scale).round().to(torch.int8)
        return lambda: call(x, weight, scale[:, 0], bias)

    return make


def _int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    values = x.float()
    scale = values.abs().amax(1, keepdim=True) / 127
    products = torch._int_mm((values / scale).round().to(torch.int8), weight.t())
    return (products.float() * scale * weight_scale + bias.float()).bfloat16()


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
ON_GPUS: dict[str, tuple[Callable[[Problem], MakeCopy], int | None]] = {
    OURS: (packed, None),
    "torch_bf16": (torch_bf16, 16),
    "int8_mm": (int8_mm, 8),
    "torchao": (torchao, 8),
    "torchao_fp8": (torchao_fp8, 8),
}
