"""Ops past the dispatcher: the same results, and whoever watches operators sees every one of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qvgen.kernels import block_ops, direct, linear_ops
from qvgen.nn.timestep import set_timestep
from qvgen.quant.scheme import QuantArgs
from tests.support.packed_reference import build, inputs, scheme_of

X = inputs(2, 3, 32)


@pytest.fixture
def calls() -> dict[str, Callable[[], Any]]:
    """Name of an op -> a call of it, as the package makes it."""
    layer, _ = build(scheme_of(QuantArgs(), 4, 4, symmetric=False), 5, 32)
    layer.prepare_backend()
    set_timestep(torch.tensor([0.0, 900.0]))
    heads = X.unflatten(-1, (2, 16))
    lists = [[tensor] for tensor in layer._tensors()]

    def into() -> Tensor:
        layer.forward_into(X, out := torch.empty(2, 3, 5))
        return out

    return {
        "quantized_linear": lambda: layer(X),
        "quantized_linear_out": into,
        "quantized_linears": lambda: linear_ops.quantized_linears(X, *lists, *layer._arguments(X))[0],
        "add_gated": lambda: block_ops.add_gated(X, X, None),
        "attention": lambda: block_ops.attention(heads, heads, heads),
    }


class Watched(Exception):  # noqa: N818
    """The dispatcher was asked."""


@pytest.mark.parametrize("name", ["quantized_linear", "quantized_linear_out", "quantized_linears", "add_gated", "attention"])
@torch.no_grad()
def test_the_same_and_the_dispatcher_is_not_asked(
    name: str, calls: dict[str, Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = calls[name]()
    for module in (block_ops, direct):
        monkeypatch.setattr(module, "nobody_watches", lambda _: False)
    assert torch.equal(calls[name](), result)
    with torch.profiler.profile() as profiler:
        calls[name]()
    assert f"qvgen::{name}" in {event.name for event in profiler.events() or ()}
    monkeypatch.undo()
    with torch.profiler.profile() as profiler:  # somebody watches
        calls[name]()
    assert f"qvgen::{name}" in {event.name for event in profiler.events() or ()}


def test_autograd_notices_what_was_written() -> None:
    layer, _ = build(scheme_of(QuantArgs(), 4, 4, symmetric=False), 5, 32)
    set_timestep(torch.tensor([0.0]))
    out = torch.ones(1, 3, 5)
    product = (out * torch.ones(5, requires_grad=True)).sum()
    with torch.no_grad():
        layer.forward_into(X[:1], out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        layer.forward_into(X[:1], torch.empty(1, 3, 5))  # which counts no versions


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "qvgen" in str(func):
            raise Watched
        return func(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "qvgen" in str(func):
            raise Watched
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


@pytest.mark.parametrize("mode", [_Dispatch, _Function])
@torch.no_grad()
def test_modes_see_ops(mode: Any, calls: dict[str, Callable[[], Any]]) -> None:
    for call in calls.values():
        with pytest.raises(Watched), mode():
            call()


@torch.no_grad()
def test_everything_else_that_watches() -> None:
    assert direct.nobody_watches(X)
    assert direct.nobody_watches(nn.Parameter(X))
    assert not direct.nobody_watches(X.as_subclass(_Subclass))
    assert not direct.nobody_watches(X.to("meta"))
    seen = []
    torch.func.vmap(lambda x: (seen.append(direct.nobody_watches(x)), x)[1])(X)
    make_fx(lambda x: (seen.append(direct.nobody_watches(x)), x)[1])(X)
    torch.jit.trace(lambda x: (seen.append(direct.nobody_watches(x)), x + 1)[1], X, check_trace=False)
    assert seen == [False] * 3
    with torch.enable_grad():
        assert not direct.nobody_watches(nn.Parameter(X))


def test_this_torch_tells_who_watches() -> None:
    """Where it does not, ops take the dispatcher: right, and slower."""
    assert direct._CAN_TELL


def test_where_torch_does_not_tell_every_call_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert direct.nobody_watches(torch.zeros(1))
    monkeypatch.setattr(direct, "_CAN_TELL", False)
    assert not direct.nobody_watches(torch.zeros(1))
