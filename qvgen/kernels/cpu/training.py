"""Fake quantization of float32 in training, in C++: the bits that PyTorch's operations give, but for sums in another order."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qvgen.kernels.cpu import library
from qvgen.kernels.registry import KernelPreference, preference
from qvgen.quant.scheme import QuantArgs


def runs(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x is a tensor of the CPU with memory of its own (no fake one, and none that is being traced), in float32 as
    the output is. Raises as `library.isa` does under QVGEN_KERNELS=cpu."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if not plain or not x.dtype == dtype == torch.float32:
        return False
    if preference() is KernelPreference.CPU:
        return bool(library.isa())
    return preference() is KernelPreference.AUTO and not library.refusal()


def forward(x: Tensor, scale: Tensor, zero_point: Tensor, args: QuantArgs, dtype: torch.dtype) -> Tensor:
    """The quantized x, float32."""
    inputs, out = _contiguous(x, scale, zero_point), x.new_empty(x.shape)
    library.check(
        library.load().qvgen_fake_quantize(
            library.isa(),
            *_pointers(inputs),
            *_shape(x, args),
            out.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return out


def backward(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, args: QuantArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and zero_point, float32."""
    inputs = _contiguous(grad.float(), x, scale, zero_point)
    grads = x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)
    library.check(
        library.load().qvgen_fake_quantize_backward(
            library.isa(),
            *_pointers(inputs),
            *_shape(x, args),
            *_pointers(grads),
            torch.get_num_threads(),
        )
    )
    return grads


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _pointers(tensors: Iterable[Tensor]) -> list[int]:
    """Of tensors that the caller keeps until the call is over."""
    return [t.data_ptr() for t in tensors]


def _shape(x: Tensor, args: QuantArgs) -> tuple[int, int, int, bool]:
    features = x.shape[-1]
    return x.numel() // features, features, args.max_code, args.zero_point_domain == "float"
