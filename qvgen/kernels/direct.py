"""Calling an op's implementation past torch's dispatcher, which takes as long as a small layer's products.

A denoising step of the embedded model makes 72 such calls (`python -m bench.embedded`). The dispatcher is there for those who
watch or replace operators: compilers, tracing, function transforms, modes, tensor subclasses, the profiler. Where none of
them is at work, calling the implementation itself is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

_C = torch._C
_functorch: Any = getattr(_C, "_functorch", None)
_PLAIN = (Tensor, torch.nn.Parameter)
# How PyTorch tells who watches is private to it. One that tells it otherwise gets every call through its dispatcher.
_CAN_TELL = hasattr(_functorch, "peek_interpreter_stack") and all(
    hasattr(_C, name) for name in ("_len_torch_dispatch_stack", "_len_torch_function_stack", "_get_tracing_state")
)


def nobody_watches(x: Any) -> bool:
    """Whether an op whose first argument is x may be called directly: x is an ordinary tensor on the CPU without gradient."""
    return (
        _CAN_TELL
        and not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and x.is_cpu
        and not (x.requires_grad and torch.is_grad_enabled())
        and not _C._len_torch_dispatch_stack()
        and not _C._len_torch_function_stack()
        and not torch.autograd._profiler_enabled()
        and _C._get_tracing_state() is None
        and _functorch.peek_interpreter_stack() is None
    )


def _is_plain(x: Any) -> bool:
    return type(x) in _PLAIN and not (x.requires_grad and torch.is_grad_enabled())


def with_shortcut(
    op: Callable[..., Any], implementation: Callable[..., Any], written: int | None = None
) -> Callable[..., Any]:
    """`op`, which calls `implementation` itself where nobody watches. Arguments of a wrong type are refused by the schema.
    `written`: the place of the argument that the op writes into."""

    def call(*args: Any) -> Any:
        if nobody_watches(args[0]) and (written is None or _is_plain(args[written])):
            try:
                result = implementation(*args)
            except TypeError:
                return op(*args)
            if written is not None and not args[written].is_inference():
                increment_version(args[written])  # as the dispatcher does, so that autograd notices
            return result
        return op(*args)

    return call
