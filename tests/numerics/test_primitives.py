"""The definition of quantization, and its gradients against autograd through each elementwise step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvgen.quant.primitives import (
    codes,
    dequantize,
    fake_quantize,
    range_to_grid,
    round_ste,
    timestep_group,
    token_grid,
)
from qvgen.quant.scheme import QuantArgs

ARGS = [
    QuantArgs(num_bits=bits, symmetric=symmetric, strategy="token", zero_point_domain=domain)
    for bits in range(2, 9)
    for symmetric, domain in ((False, "integer"), (False, "float"), (True, "integer"))
]
ONE = torch.tensor(1.0)


def ids(args: QuantArgs) -> str:
    return f"{args.num_bits}bit-{'sym' if args.symmetric else args.zero_point_domain}"


@pytest.mark.parametrize("args", ARGS, ids=ids)
def test_codes_follow_the_definition(args: QuantArgs) -> None:
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)) * 3
    scale, zero_point = token_grid(x, ONE, ONE, args)
    ratio = x.numpy() / scale.numpy()
    if args.zero_point_domain == "float":
        expected = np.rint(ratio + zero_point.numpy())  # rint rounds half to even
    else:
        expected = np.rint(ratio) + zero_point.numpy()
    expected = np.clip(expected, 0, 2**args.num_bits - 1)
    assert np.array_equal(codes(x, scale, zero_point, args).numpy(), expected)


def test_ties_round_to_even() -> None:
    args = QuantArgs(num_bits=4)
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5])
    assert codes(x, ONE, torch.tensor(4.0), args).tolist() == [4, 6, 6, 8, 4]


@pytest.mark.parametrize("args", ARGS, ids=ids)
def test_gradients_equal_autograd_through_every_step(args: QuantArgs) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 19, generator=generator, dtype=torch.float64) * 2
    scale, zero_point = range_to_grid(*torch.aminmax(x * 0.6, dim=-1, keepdim=True), args)  # clips both sides
    inputs = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def step_by_step(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        q = round_ste(x / scale + zero_point) if args.zero_point_domain == "float" else round_ste(x / scale) + zero_point
        return scale * (q.clamp(0, args.max_code) - zero_point)

    wanted = torch.autograd.grad((step_by_step(*inputs) * weight).sum(), inputs)
    got = torch.autograd.grad((fake_quantize(*inputs, args) * weight).sum(), inputs)
    assert torch.equal(step_by_step(*inputs), fake_quantize(*inputs, args))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradient_of_the_scale_by_hand() -> None:
    # x/s = 1.3 rounds to 1 (z = 0): dx^/ds = q - x/s = -0.3. x/s = 40 is clamped to 15: dx^/ds = 15.
    scale = torch.tensor([0.5], requires_grad=True)
    x = torch.tensor([0.65, 20.0])
    fake_quantize(x, scale, torch.tensor([0.0]), QuantArgs(num_bits=4)).sum().backward()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(-0.3 + 15, abs=1e-5)


@pytest.mark.parametrize("args", ARGS, ids=ids)
def test_range_is_extended_to_contain_zero(args: QuantArgs) -> None:
    """A token in [5, 6] must not come back as 1.0, as it does in the public code."""
    x = torch.linspace(5, 6, 16)[None]
    scale, zero_point = token_grid(x, ONE, ONE, args)
    error = (fake_quantize(x, scale, zero_point, args) - x).abs().max()
    assert error <= scale.item() / 2 + 1e-6
    assert dequantize(codes(torch.zeros(1, 1), scale, zero_point, args), scale, zero_point).abs().item() <= (
        scale.item() / 2 if args.zero_point_domain == "float" else 0
    )


def test_clip_is_applied_once() -> None:
    x = torch.tensor([[-2.0, 1.0]])
    scale, _ = token_grid(x, torch.tensor(0.5), torch.tensor(0.8), QuantArgs(strategy="token"))
    assert scale.item() == pytest.approx((0.5 * 2 + 0.8 * 1) / 15)


@pytest.mark.parametrize("args", ARGS, ids=ids)
def test_constant_and_zero_tokens(args: QuantArgs) -> None:
    zeros = torch.zeros(1, 8)
    scale, zero_point = token_grid(zeros, ONE, ONE, args)
    assert scale.item() == 1
    assert torch.equal(fake_quantize(zeros, scale, zero_point, args), zeros)
    constant = torch.full((1, 8), -3.0)
    scale, zero_point = token_grid(constant, ONE, ONE, args)
    torch.testing.assert_close(fake_quantize(constant, scale, zero_point, args), constant, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("args", ARGS, ids=ids)
def test_nan_and_inf_come_out_as_nan_of_that_token_only(args: QuantArgs, bad: float) -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    x[1, 4] = bad
    out = fake_quantize(x, *token_grid(x, ONE, ONE, args), args)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
)
def test_error_is_at_most_half_a_step(bits: int, symmetric: bool, values: list[float]) -> None:
    args = QuantArgs(num_bits=bits, symmetric=symmetric, strategy="token")
    x = torch.tensor([values])
    scale, zero_point = token_grid(x, ONE, ONE, args)
    error = (fake_quantize(x, scale, zero_point, args) - x).abs()
    # Rounding the zero point moves the range by up to half a step, so an end may be off by a whole one.
    assert (error <= scale * 1.01 + 1e-30).all()


def test_timestep_groups() -> None:
    t = torch.tensor([0.0, 19.9, 20.0, 500.0, 999.9, 1000.0])
    assert timestep_group(t, 50, 1000).tolist() == [0, 0, 1, 25, 49, 49]
    assert timestep_group(torch.tensor([999]), 1, 1000).tolist() == [0]
