"""Where a packed model must answer diffusers like a plain one, and how it becomes one: `model.dequantize()`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from qvgen.integrations.fused import unfuse_
from qvgen.integrations.projections import join_as_before_
from qvgen.nn.packed_linear import packed_layers
from qvgen.nn.unpack import unpack_
from qvgen.packing.layout import CLIP_LOWER, CLIP_UPPER, INPUT_SCALE, SCALE, ZERO_POINT

_FLOAT32 = (SCALE, ZERO_POINT, CLIP_LOWER, CLIP_UPPER, INPUT_SCALE)
_OF_PACKED = ("quantization_config", "_pre_quantization_dtype")  # in a model's config


def count_(model: Any) -> None:
    """Let `model.num_parameters()` say how many parameters the full-precision model has."""
    model.num_parameters = partial(_count, model)


def cast_biases_(model: Any) -> None:
    """Let `model.enable_layerwise_casting` store in 16 bits, where it is asked to, what its rule would cast of a packed layer:
    the bias. Not in 8 bits, which would save as little and cost accuracy. The calls of a packed layer cast nothing."""
    model.enable_layerwise_casting = partial(_cast_layerwise, model)


def keep_exact_in_float32(model_class: Any) -> None:
    """List the packed layers' scales and clips among what a class keeps in float32 while it loads, if it has such a list:
    diffusers' way to say that they do not follow `dtype`. The list is the class's, of this process; full-precision models
    have no tensors of these names."""
    kept = model_class._keep_in_fp32_modules
    if isinstance(kept, list):
        model_class._keep_in_fp32_modules = [*kept, *(name for name in _FLOAT32 if name not in kept)]


def plain_(model: Any, state_hook: Callable[..., Any]) -> Any:
    """Make a loaded packed model a full-precision one, in place, and return it: weights, blocks, config, hooks.

    Activations are quantized no more. Raises ValueError as `unpack_` does.
    """
    unpack_(model, model.dtype)
    unfuse_(model)
    join_as_before_(model)
    for key in [key for key, hook in model._state_dict_hooks.items() if hook is state_hook]:
        del model._state_dict_hooks[key]
    for name in ("num_parameters", "fuse_lora", "enable_layerwise_casting", "quantization_method"):
        model.__dict__.pop(name, None)
    model._internal_dict = FrozenDict({name: value for name, value in model.config.items() if name not in _OF_PACKED})
    return model


def _cast_layerwise(
    model: Any,
    storage_dtype: torch.dtype = torch.float8_e4m3fn,
    compute_dtype: torch.dtype | None = None,
    skip_modules_pattern: tuple[str, ...] | None = None,
    skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
    non_blocking: bool = False,
) -> None:
    given = storage_dtype, compute_dtype, skip_modules_pattern, skip_modules_classes, non_blocking
    type(model).enable_layerwise_casting(model, *given)
    for name, layer in packed_layers(model):
        skipped = isinstance(layer, skip_modules_classes or ()) or any(re.search(p, name) for p in skip_modules_pattern or ())
        if layer.bias is not None and storage_dtype.itemsize == 2 and not skipped:
            layer.bias.data = layer.bias.data.to(storage_dtype)


def _count(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    found = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    for _, layer in packed_layers(model):
        for factor in (layer.low_rank_up, layer.low_rank_down):
            if factor is not None and (factor.requires_grad or not only_trainable):
                found -= factor.numel()
        found += 0 if only_trainable else layer.in_features * layer.out_features
    return found
