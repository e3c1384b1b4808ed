"""Whether the tensors of a layer fit each other: looked at when they first come, recognized when they come again.

The ops of linear_ops.py get a layer's tensors with every call, and compiled code reads memory by what they say. To ask each of
them for its shape and dtype takes as long as a small layer's products. So what was found right is kept with the prepared
weight, for as long as that lives, and holds while the same tensors come with the same memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qvgen.kernels.registry import LayerTensors


class Known:
    """A layer whose tensors were found right, and what a backend made of them (`described`); it may hold their addresses."""

    __slots__ = ("described", "facts", "others", "quantized", "weight")

    def __init__(self, layer: LayerTensors, quantized: bool, forget: Any) -> None:
        self.weight = weakref.ref(layer.weight, forget)
        self.others, self.facts, self.quantized = tuple(layer[1:]), _facts(layer), quantized
        self.described: Any = None


_known: dict[int, Known] = {}  # id of a prepared weight -> the layer it last came with


def check_layer(layer: LayerTensors, device: torch.device, quantized: bool) -> None:
    """Raises ValueError, with the tensor and what it should be, unless `layer` is one whose inputs are on `device`.
    `quantized`: it needs clips."""
    known = recall(layer)
    if known is None or known.facts != _facts(layer) or quantized > known.quantized:
        _check(layer, device, quantized)
        key = id(layer.weight)
        _known[key] = Known(layer, quantized, lambda _, key=key: _known.pop(key, None))
    elif layer.weight.device != device:
        raise ValueError(
            f"the input is on {device} and the layer on {layer.weight.device}: move one to the other's device, with "
            f".to({str(device)!r}) for the layer"
        )


def recall(layer: LayerTensors) -> Known | None:
    """The layer as `check_layer` found it in this call, if these are its tensors; by identity, the memory is not compared."""
    known = _known.get(id(layer[0]))
    if known is None or known.weight() is not layer[0]:
        return None
    a, b, c, d, e, f = known.others
    _, scale, zero_point, row_sum, lower, upper, bias = layer
    same = a is scale and b is zero_point and c is row_sum and d is lower and e is upper and f is bias
    return known if same else None


def _facts(layer: LayerTensors) -> tuple[Any, ...]:
    """What changes where somebody assigns `.data` of a tensor that compiled code reads, as casting a module does to its bias.
    At the same address lies the same memory, or other memory of a tensor that was cast and cast again: hence the dtype."""
    weight, lower, upper, bias = layer[0], *layer[4:]
    facts: tuple[Any, ...] = weight.data_ptr(), weight.numel()
    if lower is not None and upper is not None:
        facts += lower.data_ptr(), lower.numel(), upper.data_ptr(), upper.numel()
    return facts if bias is None else (*facts, bias.data_ptr(), bias.numel(), bias.dtype)


def _check(layer: LayerTensors, device: torch.device, quantized: bool) -> None:
    weight, scale, zero_point, row_sum, lower, upper, bias = layer
    for name, tensor in layer._asdict().items():
        if tensor is None and name in ("weight", "weight_scale", "weight_row_sum"):
            raise ValueError(f"{name} is missing")
        if tensor is not None and (tensor.device != device or tensor.layout != torch.strided):
            raise ValueError(
                f"{name} must be a dense tensor on {device}, as the input, not {tensor.layout} on {tensor.device}"
            )
    if not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous, as a backend prepared it, not {shape_of(weight)} {weight.stride()}")
    if scale.ndim != 2 or scale.dtype != torch.float32:
        raise ValueError(f"weight_scale must be float32 of shape (N, G), not {scale.dtype} {shape_of(scale)}")
    wanted = shape_of(scale)
    if zero_point is not None and (zero_point.shape != scale.shape or zero_point.dtype != torch.float32):
        raise ValueError(f"weight_zero_point must be float32 {wanted}, not {zero_point.dtype} {shape_of(zero_point)}")
    if row_sum.shape != scale.shape or row_sum.dtype != torch.int32:
        raise ValueError(f"weight_row_sum must be int32 {wanted}, not {row_sum.dtype} {shape_of(row_sum)}")
    if bias is not None and (bias.ndim != 1 or len(bias) != len(scale) or not bias.dtype.is_floating_point):
        raise ValueError(f"bias must be ({len(scale)},) of any float, not {bias.dtype} {shape_of(bias)}")
    if not quantized:
        return
    if lower is None or upper is None:
        raise ValueError("clip_lower and clip_upper are missing, and inputs are quantized")
    if lower.ndim != 1 or lower.shape != upper.shape or not lower.dtype == upper.dtype == torch.float32:
        shapes = f"{lower.dtype} {shape_of(lower)} and {upper.dtype} {shape_of(upper)}"
        raise ValueError(f"clip_lower and clip_upper must be float32 (timestep groups,), not {shapes}")


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def with_fake_input(fake: Callable[..., Any]) -> Callable[..., Any]:
    """A fake implementation that refuses to stand for a call with a real input. torch asks it as soon as one tensor is on
    device meta, and what it would return is memory that nobody wrote."""

    def checked(x: Any, *rest: Any) -> Any:
        if x is None:
            raise ValueError("the first tensor is missing")
        if type(x) is Tensor and not x.is_meta:
            raise ValueError("a tensor is on device meta, without values, and the input is not: was it loaded?")
        return fake(x, *rest)

    return checked
