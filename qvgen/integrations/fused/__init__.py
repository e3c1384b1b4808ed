"""Transformer blocks for packed layers: per family a file with the same computation in fewer passes over memory."""

from __future__ import annotations

from torch import nn

from qvgen.integrations.fused.cogvideox import fuse_cogvideox_, unfuse_cogvideox_
from qvgen.integrations.fused.wan import fuse_wan_, unfuse_wan_

_FUSIONS = fuse_wan_, fuse_cogvideox_
_UNDOING = unfuse_wan_, unfuse_cogvideox_


def fuse_(model: nn.Module) -> int:
    """Let every block of `model` that has packed layers and a fused form run it, in place. Returns how many do."""
    return sum(fuse_one_(model) for fuse_one_ in _FUSIONS)


def unfuse_(model: nn.Module) -> None:
    """Let every block that `fuse_` changed run as diffusers wrote it."""
    for unfuse_one_ in _UNDOING:
        unfuse_one_(model)
