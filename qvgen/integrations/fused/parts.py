"""What fused blocks of all families do alike: which blocks and parts of them may run fused, and packed layers among others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from qvgen.kernels.fused_ops import Norm
from qvgen.nn.layers_together import brought_for_each_call, is_spread, linears
from qvgen.nn.packed_linear import PackedLinear


def replace_forward_(model: nn.Module, kind: type[nn.Module], forward: Callable[..., Any]) -> list[Any]:
    """Let calls of each block of `kind` that has packed layers run `forward(block, ...)`, in place. Returns these blocks."""
    blocks = [block for block in model.modules() if type(block) is kind and _has_packed_layers(block)]
    for block in blocks:
        # Not a bound method: pickle would look for the function's name in the block.
        cast(Any, block).forward = partial(forward, block)
    return blocks


def restore_forward_(model: nn.Module, forward: Callable[..., Any]) -> None:
    """Undo `replace_forward_`."""
    for module in model.modules():
        found = module.__dict__.get("forward")
        if isinstance(found, partial) and found.func is forward:
            del module.__dict__["forward"]


def _has_packed_layers(block: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear) for module in block.modules())


def needs_hooks(module: nn.Module, norm: nn.Module) -> bool:
    """Whether the parts of `module`, a block or an attention, must be called for their hooks; `norm` is one of them, whose
    tensors fused blocks read."""
    return brought_for_each_call(norm) or is_spread(module)


def packed_feed_forward(ffn: FeedForward) -> tuple[PackedLinear, PackedLinear] | None:
    """The two layers of a feed-forward that is one op: GELU in its tanh form, both packed, no dropout. Else None."""
    activation, dropout, down, *final_dropout = ffn.net
    if not isinstance(activation, GELU) or activation.approximate != "tanh" or any(map(_drops, (dropout, *final_dropout))):
        return None
    up = activation.proj
    return (up, down) if isinstance(up, PackedLinear) and isinstance(down, PackedLinear) else None


def _drops(part: nn.Module) -> bool:
    return part.training and bool(getattr(part, "p", 0))


def shared(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """Outputs of layers that read the same input."""
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    return linears(x, packed) if len(packed) == len(layers) else [layer(x) for layer in layers]


def norm_of(norm: Any, scale: Tensor | None, shift: Tensor | None) -> Norm:
    """A module's layer norm, with what modulates it."""
    return Norm(norm.weight, norm.bias, scale, shift, norm.eps)
