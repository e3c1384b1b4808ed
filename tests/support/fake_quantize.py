"""Kernels of fake quantization against PyTorch's operations: outputs and dx bit for bit, sums within their rounding."""

from __future__ import annotations

import pytest
import torch

from qvgen.kernels.training import choose
from qvgen.nn.qat_linear import QATLinear
from qvgen.nn.swap import prepare_
from qvgen.quant import primitives
from qvgen.quant.primitives import FusedFakeQuantize, gradients, quantized, range_to_grid
from qvgen.quant.scheme import QuantArgs, QuantScheme

# Of the sum of absolute values: float32 sums of up to 1536 terms in another order, and the roundings of each term.
SUMS = 2e-6
KINDS = [(False, "float"), (False, "integer"), (True, "integer")]  # symmetric, domain of the zero point


def subject(k: int, args: QuantArgs, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x (2, 3, k), a grid that clamps some of it, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(2, 3, k, generator=generator) + 0.3).to(dtype)
    lower, upper = (0.6 * f(x.float(), -1, keepdim=True) for f in (torch.amin, torch.amax))
    return x, *range_to_grid(lower, upper, args), torch.randn(x.shape, generator=generator).to(dtype)


def extremes() -> tuple[torch.Tensor, ...]:
    """Rows of ties, of numbers that overflow a grid, of tiny ones, and of NaN, in a number and in a scale."""
    halves = torch.arange(-32, 32).float() / 2
    rows = torch.stack([halves, halves * 1e30, halves * 1e-30, torch.full((64,), 5.0)])
    rows[3, 7] = float("nan")
    scale = torch.tensor([1.0, 1.0, 1.0, float("nan")]).view(4, 1)
    return rows, scale, torch.full((4, 1), 8.0), torch.ones(4, 64)


def check(
    kernels: FusedFakeQuantize,
    args: QuantArgs,
    tensors: tuple[torch.Tensor, ...],
    dtypes: list[torch.dtype],
    device: str = "cpu",
) -> None:
    """`kernels` on `tensors` (x, scale, zero_point, gradient), with outputs in each of `dtypes`."""
    x, scale, zero_point, grad = tensors
    x_there, scale_there, zero_point_there, grad_there = (t.to(device) for t in tensors)
    there = x_there, scale_there, zero_point_there
    for dtype in dtypes:
        ours, theirs = kernels.forward(*there, args, dtype).cpu(), quantized(x, scale, zero_point, args, dtype)
        # Triton's interpreter cuts float32 off there instead of rounding it.
        cut = dtype is torch.bfloat16 and device == "cpu"
        torch.testing.assert_close(ours, theirs, rtol=2**-7 if cut else 0, atol=0, equal_nan=True)
    grad_x, grad_scale, grad_zero_point = (t.cpu() for t in kernels.backward(grad_there, *there, args))
    expected = gradients(grad, x, scale, zero_point, args)
    assert torch.equal(grad_x, expected[0]) and grad_x.dtype == x.dtype  # type: ignore[arg-type]
    y = quantized(x, scale, zero_point, args, torch.float32)
    size = (grad.float() * y).abs().sum(-1, keepdim=True) + (grad.float() * x.float()).abs().sum(-1, keepdim=True)
    assert _within(grad_scale, expected[1], SUMS * size / scale)
    assert _within(grad_zero_point, expected[2], SUMS * scale * grad.float().abs().sum(-1, keepdim=True))


def _within(ours: torch.Tensor, theirs: torch.Tensor | None, bound: torch.Tensor) -> bool:
    assert theirs is not None and torch.equal(ours.isnan(), theirs.isnan())
    return bool(((ours - theirs).abs() <= bound)[~theirs.isnan()].all())


def check_layer(kernels: FusedFakeQuantize, monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> None:
    """A layer in training has the same gradients with `kernels`: of its input, weight, scales, zero points and clips."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 40)).to(device)
    prepare_(model, QuantScheme(timestep_groups=1))
    assert isinstance(model[0], QATLinear)
    x, found, calls = torch.randn(2, 5, 96, device=device), [], []
    for used in (None, kernels):
        monkeypatch.setattr(primitives, "choose_fused", lambda *_, used=used: calls.append(used) or used)
        model.zero_grad()
        given = x.clone().requires_grad_()
        model(given).square().sum().backward()
        found.append([given.grad, *(p.grad for p in model.parameters())])
    assert calls == [None, None, kernels, kernels] and len(found[0]) == 7
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def chosen(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> FusedFakeQuantize | None:
    """What quantizes x (..., k) with a grid for each row."""
    grid = torch.ones(*x.shape[:-1], 1, device=x.device)
    return choose(x, grid, grid, QuantArgs(num_bits=4, strategy="token"), dtype)
