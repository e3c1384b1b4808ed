"""Tensors of which each process of a group holds some rows: DTensors, as PyTorch's FSDP2 leaves the parameters of a model.

A tensor that nobody shares is its own whole. All processes of the group make the calls that gather, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, whose class takes a second to import."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> torch.Tensor:
    """All of a tensor, gathered from the group."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_rows(tensor: Any) -> torch.Tensor:
    """What this process holds of it, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def shared_as(like: Any, value: torch.Tensor) -> torch.Tensor:
    """`value`, which every process has, on the device of `like` and shared out as that is; nothing is sent. Where `like` is
    sharded and larger, zeros follow. Raises ValueError if it is smaller."""
    if not is_sharded(like):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    missing = [there - here for there, here in zip(like.shape, value.shape, strict=True)]
    if min(missing, default=0) < 0:
        raise ValueError(f"a tensor of shape {tuple(value.shape)} does not fit into one of {tuple(like.shape)}")
    # Of the last dimension first, as F.pad wants it.
    padded = F.pad(value.to(like.device), [n for count in reversed(missing) for n in (0, count)])
    return distribute_tensor(padded, like.device_mesh, like.placements, src_data_rank=None)
