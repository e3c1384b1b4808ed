"""Transformer blocks for packed layers: per family a file with the same computation in fewer passes over memory."""

from __future__ import annotations

from torch import nn

from qvgen.integrations.fused.wan import fuse_wan_

_FUSIONS = (fuse_wan_,)


def fuse_(model: nn.Module) -> int:
    """Let every block of `model` that has packed layers and a fused form run it, in place. Returns how many do."""
    return sum(fuse_one_(model) for fuse_one_ in _FUSIONS)
