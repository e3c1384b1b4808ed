"""Packed layers with what stands before and after them: in every backend here, what its ops give one after the other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qvgen.kernels import registry
from qvgen.kernels.block_ops import add_gated, layer_norm_modulate
from qvgen.kernels.cpu.backend import CpuBackend
from qvgen.kernels.fused_ops import Norm
from qvgen.kernels.registry import KernelPreference
from qvgen.nn.layers_together import added_feed_forward, added_linear, feed_forward, linears, normalized_linears
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.timestep import set_timestep
from qvgen.quant.scheme import QuantArgs, QuantScheme
from tests.support.packed_reference import build, inputs, scheme_of

N, S, D, WIDE = 2, 5, 32, 48
BACKENDS = ["reference", *([] if CpuBackend().available() else ["cpu"])]
W4A4 = scheme_of(QuantArgs(), 4, 4, symmetric=False)
SCHEMES = {"w4a4": W4A4, "w4a16": QuantScheme(weights=QuantArgs(), input_activations=None)}
OPS = torch.ops.qvgen


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> KernelPreference:
    monkeypatch.setenv(registry.ENVIRONMENT, request.param)
    set_timestep(torch.tensor([10.0, 900.0]))
    return KernelPreference(request.param)


def layer(n: int, k: int, scheme: QuantScheme = W4A4, seed: int = 0) -> PackedLinear:
    return build(scheme, n, k, seed)[0]


def norm(dtype: torch.dtype = torch.float32) -> Norm:
    weight, bias, scale, shift = (inputs(N, 1, D, seed=seed) for seed in range(4))
    return Norm(weight[0, 0].to(dtype), bias[0, 0], scale, shift, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_same_bits_as_one_after_the_other(scheme: QuantScheme, dtype: torch.dtype) -> None:
    up, more, down = layer(WIDE, D, scheme), layer(7, D, scheme, 1), layer(D, WIDE, scheme)
    x, wide, gate, before = inputs(N, S, D).to(dtype), inputs(N, S, WIDE).to(dtype), inputs(N, S, D, seed=2), norm(dtype)
    normalized = layer_norm_modulate(x, *before)
    for one, other in zip(normalized_linears(x, before, [up, more]), linears(normalized, [up, more]), strict=True):
        assert torch.equal(one, other)
    for some in (None, gate, gate[:, :1]):
        assert torch.equal(added_linear(wide, down, x, some), add_gated(x, down(wide), some))
        expected = add_gated(x, feed_forward(normalized, up, down), some)
        assert torch.equal(added_feed_forward(x, before, up, down, some), expected)


def calls(x: Tensor) -> list[tuple[Any, tuple[Any, ...]]]:
    up, down = layer(WIDE, D), layer(D, WIDE)
    arguments = up._check_input(x) or up._arguments(x)
    down._ensure_prepared()
    one, both = up._tensors(), list(map(list, zip(up._tensors(), down._tensors(), strict=True)))
    return [
        (OPS.layer_norm_linears.default, (x, *norm(), *[[t] for t in one], *arguments)),
        (OPS.linear_add_gated.default, (x, *one, *arguments, inputs(N, S, WIDE).to(x.dtype), None)),
        (OPS.layer_norm_feed_forward.default, (x, *norm(), *both, *arguments, inputs(N, 1, D))),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    for op, arguments in calls(inputs(N, S, D).to(dtype)):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_wrong_arguments_are_told() -> None:
    linears_call, gated_call, feed_call = calls(inputs(N, S, D))
    for (op, arguments), place, wrong, said in [
        (linears_call, 3, inputs(N, 2, D), "scale must be floating point of shape"),
        (linears_call, 0, inputs(N, S, D)[0], r"x must be dense, floating point and of shape \(n, s, d\)"),
        (gated_call, -2, inputs(N, S, D), r"must be floating point of shape \(2, 5, 32\), not torch.float32 \(2, 5, 48\)"),
        (gated_call, -1, inputs(N, 2, WIDE), "gate must be floating point of shape"),
        (feed_call, -1, inputs(N, 2, D), "gate must be floating point of shape"),
        (feed_call, 6, arguments_of(feed_call)[6][:1], "each list must have an entry for each layer"),
    ]:
        changed = list(arguments)
        changed[place] = wrong
        with pytest.raises(ValueError, match=said):
            op(*changed)


def arguments_of(call: tuple[Any, tuple[Any, ...]]) -> tuple[Any, ...]:
    return call[1]


def test_a_gradient_and_a_hook_get_each_layer_by_itself() -> None:
    x, up, down, before = inputs(N, S, D), layer(WIDE, D), layer(D, WIDE), norm()
    asked = [t.clone().requires_grad_() for t in (before.scale, inputs(N, 1, D, seed=5)) if t is not None]
    y = added_feed_forward(x, before._replace(scale=asked[0]), up, down, asked[1])
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(y.sum(), asked))
    seen: list[str] = []
    up.register_forward_hook(lambda *_: seen.append("up"))
    down.register_forward_pre_hook(lambda *_: seen.append("down"))
    with torch.no_grad():
        torch.testing.assert_close(added_feed_forward(x, before._replace(scale=asked[0]), up, down, asked[1]), y.detach())
        normalized_linears(x, before, [up, up])
    assert seen == ["up", "down", "up", "up"]
