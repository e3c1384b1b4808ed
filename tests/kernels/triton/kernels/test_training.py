"""Fused fake quantization against that of quant/primitives.py: outputs and dx bit for bit, sums within their rounding."""

from typing import Any

import pytest
import torch

from qvgen.kernels.triton.training import launch, self_check
from qvgen.nn.qat_linear import QATLinear
from qvgen.nn.swap import prepare_
from qvgen.quant.primitives import _FakeQuantize, fake_quantize, range_to_grid
from qvgen.quant.scheme import QuantArgs, QuantScheme

# Of the sum of absolute values: float32 sums of up to 1536 terms in another order, and the roundings of each term.
SUMS = 2e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [(False, "float"), (False, "integer"), (True, "integer")]


def subject(k: int, args: QuantArgs, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x (2, 3, k), a grid that clamps some of it, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(2, 3, k, generator=generator) + 0.3).to(dtype)
    lower, upper = (0.6 * f(x.float(), -1, keepdim=True) for f in (torch.amin, torch.amax))
    return x, *range_to_grid(lower, upper, args), torch.randn(x.shape, generator=generator).to(dtype)


def check(args: QuantArgs, device: str, *tensors: torch.Tensor) -> None:
    x, scale, zero_point, grad = tensors
    given = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    y = _FakeQuantize.apply(*given, args)
    y.backward(grad.float())
    moved = [t.to(device) for t in tensors]
    assert launch.takes(*moved[:3])
    for dtype in DTYPES:
        ours = launch.forward(*moved[:3], args, dtype).cpu()
        if dtype is torch.bfloat16 and device == "cpu":  # the interpreter cuts float32 off there instead of rounding it
            torch.testing.assert_close(ours, y.to(dtype), rtol=2**-7, atol=0, equal_nan=True)
        else:
            torch.testing.assert_close(ours, y.detach().to(dtype), rtol=0, atol=0, equal_nan=True)
    grad_x, grad_scale, grad_zero_point = (t.cpu() for t in launch.backward(moved[3], *moved[:3], args))
    assert torch.equal(grad_x, given[0].grad) and grad_x.dtype == x.dtype  # type: ignore[arg-type]
    size = (grad.float() * y.detach()).abs().sum(-1, keepdim=True) + (grad.float() * x.float()).abs().sum(-1, keepdim=True)
    assert within(grad_scale, given[1].grad, SUMS * size / scale)
    assert within(grad_zero_point, given[2].grad, SUMS * scale * grad.float().abs().sum(-1, keepdim=True))


def within(ours: torch.Tensor, theirs: torch.Tensor | None, bound: torch.Tensor) -> bool:
    assert theirs is not None and torch.equal(ours.isnan(), theirs.isnan())
    return bool(((ours - theirs).abs() <= bound)[~theirs.isnan()].all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("symmetric", "domain"), KINDS)
def test_every_grid(bits: int, symmetric: bool, domain: str, device: str) -> None:
    args = QuantArgs(num_bits=bits, symmetric=symmetric, zero_point_domain=domain)  # type: ignore[arg-type]
    check(args, device, *subject(100, args, torch.float32))


@pytest.mark.parametrize("k", [1, 33, 1536])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_length(dtype: torch.dtype, k: int, device: str) -> None:
    args = QuantArgs(num_bits=4, strategy="token")
    check(args, device, *subject(k, args, dtype))


@pytest.mark.parametrize(("symmetric", "domain"), KINDS)
def test_ties_extremes_and_nan(symmetric: bool, domain: str, device: str) -> None:
    args = QuantArgs(num_bits=4, symmetric=symmetric, zero_point_domain=domain)  # type: ignore[arg-type]
    halves = torch.arange(-32, 32).float() / 2
    rows = torch.stack([halves, halves * 1e30, halves * 1e-30, torch.full((64,), 5.0)])
    rows[3, 7] = float("nan")
    scale = torch.tensor([1.0, 1.0, 1.0, float("nan")]).view(4, 1)
    check(args, device, rows, scale, torch.full((4, 1), 8.0), torch.ones(4, 64))


def test_what_it_does_not_take(device: str) -> None:
    x, grid = torch.ones(2, 3, 8, device=device), torch.ones(2, 3, 1, device=device)
    assert launch.takes(x, grid, grid)
    assert not launch.takes(x, grid[:1], grid[:1])  # a grid for several rows
    assert not launch.takes(x.double(), grid, grid) and not launch.takes(x, grid.double(), grid)
    assert not launch.takes(x.new_ones(1, 1, 2**15 + 1), grid[:1, :1], grid[:1, :1])


def test_a_layer_in_training_gets_the_same_gradients(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its input, weight, scales, zero points and clips; `calls` shows that the kernels ran."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 40)).to(device)
    prepare_(model, QuantScheme(timestep_groups=1))
    assert isinstance(model[0], QATLinear)
    x, found, calls = torch.randn(2, 5, 96, device=device), [], []
    for fused in (False, True):
        monkeypatch.setattr(launch, "runs", lambda *t, fused=fused: fused and (calls.append(1) or launch.takes(*t[:3])))
        model.zero_grad()
        given = x.clone().requires_grad_()
        model(given).square().sum().backward()
        found.append([given.grad, *(p.grad for p in model.parameters())])
    assert len(calls) == 2 and len(found[0]) == 7
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize(("symmetric", "domain"), KINDS)
def test_the_check_before_first_use(
    symmetric: bool, domain: str, x_dtype: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    """It lets these kernels through, and not where the grid of another is taken."""
    ours = self_check.Kernels(launch.forward, launch.backward)
    for bits, k in ((2, 33), (4, 1536), (8, 100)):
        args = QuantArgs(num_bits=bits, symmetric=symmetric, zero_point_domain=domain)  # type: ignore[arg-type]
        assert self_check.difference(ours, k, x_dtype, args, dtype, torch.device(device)) == ""
    other = QuantArgs(num_bits=7, symmetric=symmetric, zero_point_domain=domain)  # type: ignore[arg-type]
    wrong = self_check.Kernels(lambda x, s, z, _, to: launch.forward(x, s, z, other, to), launch.backward)
    assert self_check.difference(wrong, 100, x_dtype, args, dtype, torch.device(device)).startswith("outputs differ in ")


def test_a_wrong_kernel_is_not_used(device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(launch, "on_gpu", lambda _: True)
    monkeypatch.setattr(launch, "missing", lambda _: "")
    args, calls = QuantArgs(num_bits=4, strategy="token"), []
    x, scale, zero_point, _ = (t.to(device) for t in subject(64, args, torch.float32))
    for name, empty in (("_agreed", set()), ("_wrong", {}), ("_announced", set())):
        monkeypatch.setattr(self_check, name, empty)
    backward = launch.backward

    def spoiled(*given: Any) -> Any:
        calls.append(1)
        return tuple(1.01 * grad for grad in backward(*given))

    def grad() -> torch.Tensor | None:
        leaf = x.clone().requires_grad_()
        fake_quantize(leaf, scale, zero_point, args).sum().backward()
        return leaf.grad

    expected = grad()
    monkeypatch.setattr(launch, "backward", spoiled)
    monkeypatch.setattr(self_check, "_agreed", set())
    assert torch.equal(grad(), expected) and len(calls) == 1  # type: ignore[arg-type]
    assert "gradients of x differ in " in caplog.text
