"""diffusers' `fuse_qkv_projections` on a packed model.

It joins the weights of q, k and v to one full-precision layer, which would undo the packing. Here the joint layer calls the
packed layers one by one and puts their outputs side by side: the same numbers, and nothing is stored twice. Wan's fused
blocks take no notice of it: they read the input of q, k and v once anyway. CogVideoX's get a processor of diffusers by it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import nn

from qvgen.nn.packed_linear import PackedLinear

_JOINT = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
_PROJECTIONS = {name for names in _JOINT.values() for name in names}


class JointProjections(nn.Module):
    """Outputs (n, s, sum of N) of layers of an attention, looked up by name at each call, so that adapters count. It has no
    tensors of its own: those that are moved, cast and saved are the layers'."""

    def __init__(self, attention: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.__dict__["attention"] = attention  # around nn.Module, which would make it a part of its own part
        self.names = names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([getattr(self.attention, name)(x) for name in self.names], dim=-1)


def join_without_copies_(model: nn.Module) -> int:
    """Let every attention of `model` whose projections are packed join them in this way. Returns how many do."""
    count = 0
    for module in model.modules():
        packed = any(isinstance(getattr(module, layer, None), PackedLinear) for layer in _PROJECTIONS)
        if packed and hasattr(module, "fuse_projections"):
            # On the instance, which all ways to fuse go through: those of pipeline, model and attention.
            cast(Any, module).fuse_projections = partial(_fuse, module)
            count += 1
    return count


def join_as_before_(model: nn.Module) -> None:
    """Undo `join_without_copies_`, for a model whose layers are packed no more."""
    for module in model.modules():
        found = module.__dict__.get("fuse_projections")
        if isinstance(found, partial) and found.func is _fuse:
            del module.__dict__["fuse_projections"]


def _fuse(attention: Any, *args: Any, **kwargs: Any) -> None:
    # diffusers' own method knows which projections this kind of attention joins. The layers it makes are full-precision
    # ones, of this attention alone and for a moment.
    type(attention).fuse_projections(attention, *args, **kwargs)
    for name, names in _JOINT.items():
        if isinstance(attention._modules.get(name), nn.Linear):
            attention._modules[name] = JointProjections(attention, names)
