"""kernels/whole_block.py on the CPU: pointers and shapes for libqvgen_cpu.

What is unusual in any way is left to the ops one by one, which convert it or say what is wrong.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qvgen.kernels import linear_ops
from qvgen.kernels.cpu import library
from qvgen.kernels.cpu.block_functions import is_short
from qvgen.kernels.cpu.descriptions import DTYPES, describe_input, describe_layer
from qvgen.kernels.registry import Arguments, LayerTensors
from qvgen.kernels.whole_block import Attention, Layers, Step

# A thread takes whole samples. Of this many bytes of weights times tokens a sample is, in about a millisecond, worth more than
# calling its ops one by one costs, which share out tokens evenly.
MOST_WORK = 1 << 27


class _Unusual(Exception):  # noqa: N818  no error: another way takes it
    pass


def transformer_block(x: Tensor, steps: Sequence[Step], layers: Layers, arguments: Arguments) -> Tensor | None:
    if x.dtype not in DTYPES or not x.is_contiguous() or not x.numel():
        return None
    weights = sum(layer.weight.numel() for of_step in layers for layer in of_step)
    if weights * x.shape[1] > MOST_WORK:
        return None
    alive: list[object] = []  # what the structures point to
    try:
        parts = [_described(step, of_step, x, arguments, alive) for step, of_step in zip(steps, layers, strict=True)]
    except _Unusual:
        return None
    out, features = torch.empty_like(x), x.shape[2]
    library.check(
        library.load().qvgen_transformer_block(
            library.isa(),
            (library.BlockStep * len(parts))(*parts),
            len(parts),
            features,
            ctypes.byref(describe_input(x, arguments)),
            out.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return out


def _described(
    step: Step, layers: Sequence[LayerTensors], x: Tensor, arguments: Arguments, alive: list[object]
) -> library.BlockStep:
    norm, attention, gate = step
    described, features = library.BlockStep(), x.shape[2]
    if norm is not None:
        described.normalized, described.norm_eps = 1, norm.eps
        described.norm_weight = _floats(norm.weight, (features,), alive)
        described.norm_bias = _floats(norm.bias, (features,), alive)
        if (modulation := norm.modulation) is not None:
            described.scale, described.shift = _modulation(norm.scale, x), _modulation(norm.shift, x)
            described.modulation_samples, described.modulation_tokens = _strides(modulation)
            if norm.scale is not None and norm.shift is not None and norm.scale.stride() != norm.shift.stride():
                raise _Unusual
    if gate is not None:
        described.gate, (described.gate_samples, described.gate_tokens) = _modulation(gate, x), _strides(gate)
    linear_ops.check(x, layers, arguments)
    between = layers[0].weight_scale.shape[0]
    if attention is not None:
        _describe_attention(described, attention, between, x, alive)
    of_text = features if attention is None or attention.text is None else attention.text.shape[2]
    inputs = (features, between) if attention is None else (features, of_text, of_text, between)
    parts = [
        describe_layer(layer, arguments, None, size, attention is None and layer is layers[0])
        for layer, size in zip(layers, inputs, strict=True)
    ]
    described.layers = array = (library.Layer * len(parts))(*parts)
    alive += parts, array  # the parts too: they keep alive what they point to, and the array's copies do not
    return described


def _describe_attention(
    described: library.BlockStep, attention: Attention, inner: int, x: Tensor, alive: list[object]
) -> None:
    samples, tokens, _ = x.shape
    heads, query_norm, key_norm, cosine, sine, text = attention
    keys, width = tokens if text is None else text.shape[1], inner // heads
    if not is_short(x.dtype, tokens, keys, width) or (cosine is None) != (sine is None):
        raise _Unusual
    if text is not None:
        usual = type(text) is Tensor and text.dtype == x.dtype and text.is_cpu and text.is_contiguous()
        if not usual or text.ndim != 3 or len(text) != samples or cosine is not None:
            raise _Unusual
        described.text, described.text_tokens = text.data_ptr(), keys
    described.heads, described.attention_scale = heads, 1 / math.sqrt(width)
    described.query_eps, described.key_eps = query_norm.eps, key_norm.eps
    described.query_weight = _floats(query_norm.weight, (inner,), alive)
    described.key_weight = _floats(key_norm.weight, (inner,), alive)
    described.cosine = _floats(cosine, (1, tokens, 1, width), alive)
    described.sine = _floats(sine, (1, tokens, 1, width), alive)


def _floats(tensor: Tensor | None, shape: tuple[int, ...], alive: list[object]) -> int | None:
    if tensor is None:
        return None
    if tensor.shape != shape or not tensor.is_cpu:
        raise _Unusual
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        tensor = tensor.float().contiguous()
        alive.append(tensor)
    return tensor.data_ptr()


def _modulation(tensor: Tensor | None, x: Tensor) -> int | None:
    """Samples and tokens may lie apart, as those of the parts of one tensor do."""
    if tensor is None:
        return None
    samples, _, features = x.shape
    if tensor.dtype != torch.float32 or not tensor.is_cpu or tensor.stride(-1) != 1:
        raise _Unusual
    if tensor.shape != x.shape and tensor.shape != (samples, 1, features):
        raise _Unusual
    return tensor.data_ptr()


def _strides(tensor: Tensor) -> tuple[int, int]:
    samples, tokens, _ = tensor.stride()
    return samples, tokens if tensor.shape[1] > 1 else 0
