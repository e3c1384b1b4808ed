"""What the library is told of a layer and of its input: api.h's structures, made of tensors that checked.py has looked at."""

from __future__ import annotations

import operator

import torch

from qvgen.kernels import checked
from qvgen.kernels.cpu import library
from qvgen.kernels.registry import Arguments, LayerTensors

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # that compiled code reads and writes


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def describe_layer(
    tensors: LayerTensors, arguments: Arguments, output: torch.Tensor | None, in_features: int, gelu: bool
) -> library.Layer:
    """`output`: where it goes; None where the library puts it where it likes."""
    known = checked.recall(tensors)
    if known is not None and known.described is not None:
        found = library.Layer.from_buffer_copy(known.described)
    else:
        found = _described(tensors)
        if known is not None and all(map(operator.is_, found.alive, (tensors.clip_lower, tensors.clip_upper, tensors.bias))):
            known.described = bytes(found)
    found.out, found.out_dtype = (None, 0) if output is None else (output.data_ptr(), DTYPES[output.dtype])
    found.in_features, found.gelu = in_features, gelu
    found.activation_bits, found.activation_symmetric = arguments.activation_bits or 0, arguments.activation_symmetric
    return found


def _described(tensors: LayerTensors) -> library.Layer:
    """What is the same in every call of a layer. It is kept where it points to the layer's own tensors, not to copies."""
    bias = tensors.bias
    if bias is not None and bias.dtype not in DTYPES:
        bias = bias.to(torch.float32)
    parts = tensors.clip_lower, tensors.clip_upper, bias
    if not all(part is None or part.is_contiguous() for part in parts):
        parts = tuple(None if part is None else part.contiguous() for part in parts)
    lower, upper, bias = parts
    layer = library.Layer(
        weight=tensors.weight.data_ptr(),
        weight_bytes=tensors.weight.numel(),
        clip_lower=pointer(lower),
        clip_upper=pointer(upper),
        bias=pointer(bias),
        out_features=tensors.weight_scale.shape[0],
        groups=tensors.weight_scale.shape[1],
        clips=0 if lower is None else lower.shape[0],
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
    )
    layer.alive = lower, upper, bias  # for as long as the structure points to it
    return layer


def describe_input(x: torch.Tensor, arguments: Arguments) -> library.Input:
    group = None if arguments.activation_bits is None else arguments.timestep_group
    group = None if group is None else group.contiguous()
    samples = x.shape[0] if x.ndim > 1 else 1
    rows = x.shape[:-1].numel()
    found = library.Input(
        x=x.data_ptr(),
        samples=samples,
        tokens=rows // samples if samples else 0,
        timestep_group=pointer(group),
        timestep_groups=0 if group is None else group.shape[0],
        dtype=DTYPES[x.dtype],
    )
    found.alive = x, group
    return found
