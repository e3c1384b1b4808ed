"""Steps of a transformer block in one call, where a backend has that: x + gate * f(norm(x)) for one f after the other.

With short sequences, calling a block's ops one by one takes longer than they do (`python -m bench.embedded`). The results
are those of fused_ops.py and block_ops.py one by one, to the last bit. It is no op of its own: whoever watches operators sees
those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from qvgen.kernels import registry
from qvgen.kernels.direct import nobody_watches
from qvgen.kernels.fused_ops import Norm
from qvgen.kernels.registry import Arguments, KernelPreference, LayerTensors


class RmsNorm(NamedTuple):
    """An RMS norm over all heads."""

    weight: Tensor | None  # (heads * D,)
    eps: float


class Attention(NamedTuple):
    """Attention of x to itself, or to a text."""

    heads: int
    query_norm: RmsNorm
    key_norm: RmsNorm
    cosine: Tensor | None  # (1, s, 1, D), as rms_norm_rotary has them
    sine: Tensor | None
    text: Tensor | None  # (n, t, K), which k and v read; none: x


class Step(NamedTuple):
    """x + gate * f(norm(x))."""

    norm: Norm | None
    attention: Attention | None  # f; none: two layers with a GELU between them, in its tanh form
    gate: Tensor | None  # (n, 1, d) or (n, s, d)


Layers = Sequence[Sequence[LayerTensors]]  # of each step: to q, k, v and out, or up and down


class WholeBlock(Protocol):
    """What a backend may have besides registry.Backend."""

    def transformer_block(self, x: Tensor, steps: Sequence[Step], layers: Layers, arguments: Arguments) -> Tensor | None:
        """x (n, s, d) after all steps; None where it does not take these. Nothing in `steps` has been looked at before."""
        ...


def may_run(x: Tensor) -> bool:
    """Whether blocks of x may run in one call, whatever their steps."""
    return not torch.is_grad_enabled() and x.ndim == 3 and nobody_watches(x)


def transformer_block(x: Tensor, steps: Sequence[Step], layers: Layers, arguments: Arguments) -> Tensor | None:
    """x (n, s, d) after all steps, or None where they must be taken one by one; those then say what is wrong."""
    backend = registry.get(arguments.backend)
    if not hasattr(backend, "transformer_block") or registry.preference() not in (KernelPreference.AUTO, backend.name):
        return None
    return cast(WholeBlock, backend).transformer_block(x, steps, layers, arguments)
