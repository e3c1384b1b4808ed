"""Layers whose inputs are not quantized, in every instruction set: weights to the last bit, sums within a bound of float64."""

import pytest
import torch
from torch import Tensor

from qvgen.kernels.registry import KernelPreference
from qvgen.nn.layers_together import feed_forward, linears
from qvgen.nn.packed_linear import PackedLinear
from qvgen.quant.scheme import QuantArgs, QuantScheme
from tests.support.packed_reference import build, inputs

WEIGHTS = {
    "channel": QuantArgs(zero_point_domain="float"),
    "symmetric": QuantArgs(symmetric=True),
    "group": QuantArgs(strategy="group", group_size=20),  # not whole steps of 8
}
FLOAT32, BFLOAT16 = 2.0**-24, 2.0**-8  # half a unit in the last place, relative


def cpu_layer(n: int, k: int, bits: int = 4, weight: str = "channel", bias: bool = True) -> tuple[PackedLinear, Tensor]:
    args = WEIGHTS[weight].model_copy(update={"num_bits": bits})
    layer, dequantized = build(QuantScheme(weights=args, input_activations=None), n, k, bias=bias)
    layer.prepare_backend(KernelPreference.CPU)
    return layer, dequantized


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights_are_those_of_training(isa: str, weight: str, bits: int) -> None:
    layer, dequantized = cpu_layer(70, 220, bits, weight, bias=False)
    one_each = torch.eye(220).unsqueeze(0)
    assert torch.equal(layer(one_each)[0], dequantized.T)
    assert torch.equal(layer(one_each.bfloat16())[0], dequantized.T.bfloat16())


@pytest.mark.parametrize("shape", [(1, 5, 20), (7, 64, 100), (50, 130, 1620), (1600, 65, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", ["channel", "group"])
def test_sums(isa: str, shape: tuple[int, int, int], dtype: torch.dtype, weight: str) -> None:
    m, n, k = shape
    layer, dequantized = cpu_layer(n, k, 4, weight)
    x = inputs(2, m, k).to(dtype)
    w = dequantized.bfloat16().double() if dtype == torch.bfloat16 else dequantized.double()
    assert layer.bias is not None
    exact = x.double() @ w.T + layer.bias.double()
    # Each of the K sums and products rounds by at most half a unit of what all terms together amount to; then the output.
    bound = (k + 3) * FLOAT32 * (x.double().abs() @ w.T.abs() + layer.bias.double().abs())
    if dtype != torch.float32:
        bound += BFLOAT16 * exact.abs() + BFLOAT16 * bound
    assert ((layer(x).double() - exact).abs() <= bound).all()


def test_fused_ops_are_the_layers_one_by_one(isa: str) -> None:
    up, down, third = (cpu_layer(n, k)[0] for n, k in ((90, 60), (60, 90), (33, 60)))
    x = inputs(2, 9, 60).bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(linears(x, [up, third]), (up(x), third(x)), strict=True))
    hidden = torch.empty(2, 9, 90, dtype=torch.bfloat16)
    up.forward_into(x, hidden, gelu=True)
    assert torch.equal(feed_forward(x, up, down), down(hidden))


def test_any_number_of_threads(isa: str) -> None:
    layer, _ = cpu_layer(200, 500)
    before, x, results = torch.get_num_threads(), inputs(1, 900, 500).bfloat16(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_nan_stays_in_its_token(isa: str) -> None:
    layer, _ = cpu_layer(70, 100, weight="group")
    x = inputs(1, 20, 100)
    expected = layer(x)
    x[0, 7, 3] = torch.nan
    result = layer(x)
    assert result[0, 7].isnan().all()
    result[0, 7] = expected[0, 7]
    assert torch.equal(result, expected)


def test_the_gradient_is_that_of_the_weight(isa: str) -> None:
    layer, dequantized = cpu_layer(30, 40)
    x = inputs(1, 5, 40).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], dequantized.sum(0).expand(5, 40))
