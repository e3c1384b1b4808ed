"""Fused fake quantization against that of quant/primitives.py, and the check before it is first used."""

from typing import Any

import pytest
import torch

from qvgen.kernels.triton.training import launch, self_check
from qvgen.quant.primitives import fake_quantize
from qvgen.quant.scheme import QuantArgs
from tests.support.fake_quantize import KINDS, check, check_layer, extremes, subject

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("symmetric", "domain"), KINDS)
def test_every_grid(bits: int, symmetric: bool, domain: str, device: str) -> None:
    args = QuantArgs(num_bits=bits, symmetric=symmetric, zero_point_domain=domain)  # type: ignore[arg-type]
    check(launch, args, subject(100, args), DTYPES, device)


@pytest.mark.parametrize("k", [1, 33, 1536])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_length(dtype: torch.dtype, k: int, device: str) -> None:
    args = QuantArgs(num_bits=4, strategy="token")
    check(launch, args, subject(k, args, dtype), DTYPES, device)


@pytest.mark.parametrize(("symmetric", "domain"), KINDS)
def test_ties_extremes_and_nan(symmetric: bool, domain: str, device: str) -> None:
    args = QuantArgs(num_bits=4, symmetric=symmetric, zero_point_domain=domain)  # type: ignore[arg-type]
    check(launch, args, extremes(), DTYPES, device)


def test_a_layer_in_training_gets_the_same_gradients(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_layer(launch, monkeypatch, device)


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
    x, scale, zero_point, _ = (t.to(device) for t in subject(64, args))
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
