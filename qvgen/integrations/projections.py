"""diffusers' `fuse_qkv_projections` on a packed model: refused in words.

It would join the weights of q, k and v as full-precision tensors, which packed layers do not have. Fused blocks read the
input of q, k and v once anyway (fused/wan.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import nn

from qvgen.nn.packed_linear import PackedLinear

_PROJECTIONS = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj")


def refuse_fusing_(model: nn.Module) -> int:
    """Let every attention of `model` whose projections are packed refuse to join them. Returns how many do."""
    count = 0
    for name, module in model.named_modules():
        packed = any(isinstance(getattr(module, layer, None), PackedLinear) for layer in _PROJECTIONS)
        if packed and hasattr(module, "fuse_projections"):
            # On the instance, which all ways to fuse go through: those of pipeline, model and attention.
            cast(Any, module).fuse_projections = partial(_refuse, name)
            count += 1
    return count


def _refuse(name: str, *_: Any, **__: Any) -> None:
    raise ValueError(
        f"{name}: the projections are packed and cannot be joined; leave out fuse_qkv_projections(), which a packed model "
        "does not need: fused blocks read the input of q, k and v once as they are"
    )
