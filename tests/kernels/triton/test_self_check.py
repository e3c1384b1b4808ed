"""Fused fake quantization that is wrong is not used: kernels of our own making stand for those of a GPU, which is made up."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qvgen.kernels import registry
from qvgen.kernels.cpu import training as cpu
from qvgen.kernels.triton.training import launch, self_check
from qvgen.quant.primitives import fake_quantize, gradients, quantized, range_to_grid
from qvgen.quant.scheme import QuantArgs

ARGS = QuantArgs(num_bits=4, strategy="token")
NAME = "fake quantization"
Tensors = tuple[torch.Tensor, ...]


def right(calls: list[str]) -> self_check.Kernels:
    def forward(*given: Any) -> torch.Tensor:
        calls.append("forward")
        return quantized(*given)

    def backward(*given: Any) -> Any:
        calls.append("backward")
        return gradients(*given)

    return self_check.Kernels(forward, backward)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """On a GPU that was never used, with right kernels: which of them ran."""
    calls: list[str] = []
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    monkeypatch.setattr(launch, "on_gpu", lambda _: True)
    monkeypatch.setattr(launch, "missing", lambda _: "")
    monkeypatch.setattr(cpu, "runs", lambda *_: False)  # what is not on a GPU is left to PyTorch's operations
    for name, empty in (("_agreed", set()), ("_wrong", {}), ("_announced", set())):
        monkeypatch.setattr(self_check, name, empty)
    use(monkeypatch, right(calls))
    return calls


def use(monkeypatch: pytest.MonkeyPatch, kernels: self_check.Kernels) -> None:
    monkeypatch.setattr(launch, "forward", kernels.forward)
    monkeypatch.setattr(launch, "backward", kernels.backward)


def train(k: int = 96, args: QuantArgs = ARGS, dtype: torch.dtype = torch.float32) -> Tensors:
    """Quantized values and gradients of x, scale and zero_point."""
    x = torch.randn(2, 3, k, generator=torch.Generator().manual_seed(7)).to(dtype)
    grid = range_to_grid(*(0.6 * f(x.float(), -1, keepdim=True) for f in (torch.amin, torch.amax)), args)
    leaves = [t.requires_grad_() for t in (x, *grid)]
    y = fake_quantize(*leaves, args)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    return y.detach(), *(t.grad for t in leaves if t.grad is not None)


def same(a: Tensors, b: Tensors) -> bool:
    return len(a) == len(b) == 4 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_torch(monkeypatch: pytest.MonkeyPatch, **how: Any) -> Tensors:
    with monkeypatch.context() as patch:
        patch.setattr(launch, "on_gpu", lambda _: False)
        return train(**how)


def test_right_kernels_are_compared_once_for_each_kind_and_used(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = ({}, {"k": 64}, {"dtype": torch.bfloat16}, {"args": QuantArgs(num_bits=3, strategy="token")})
    for how in kinds:
        calls.clear()
        made = train(**how)
        assert calls == ["forward", "backward"] * 2  # compared, then used
        calls.clear()
        assert same(train(**how), made) and calls == ["forward", "backward"]
        assert same(by_torch(monkeypatch, **how), made) and calls == ["forward", "backward"]
    assert not caplog.messages


def one_code_off(y: torch.Tensor) -> torch.Tensor:
    y[3, 5] += 0.1
    return y


def nan(y: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(y.shape[-1]) == 9, torch.nan, y)


def fail(_: torch.Tensor) -> torch.Tensor:
    raise ValueError("ptxas: no such instruction")


WRONG: list[tuple[int | None, Callable[[torch.Tensor], torch.Tensor], str]] = [
    (None, one_code_off, "outputs differ in 1 of 768, by up to 0.1 "),
    (None, nan, "outputs differ in 8 of 768, by up to inf "),
    (None, fail, "they fail, ValueError: ptxas: no such instruction "),
    (None, lambda y: y.bfloat16(), "outputs are torch.bfloat16 (8, 96) instead of torch.float32 (8, 96) "),
    (0, lambda grad: grad * (1 + 1e-6), "gradients of x differ in "),
    (1, lambda grad: grad + 1e-3, "gradients of scale differ in "),
    (2, lambda grad: -grad, "gradients of zero_point differ in "),
]


@pytest.mark.parametrize(("gradient", "spoil", "said"), WRONG)
def test_a_wrong_kernel_is_announced_once_and_used_no_more(
    gradient: int | None,
    spoil: Callable[[torch.Tensor], torch.Tensor],
    said: str,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kernels = right(calls)

    def forward(*given: Any) -> torch.Tensor:
        y = kernels.forward(*given)
        return spoil(y) if gradient is None else y

    def backward(*given: Any) -> Any:
        found = list(kernels.backward(*given))
        if gradient is not None:
            found[gradient] = spoil(found[gradient])
        return tuple(found)

    use(monkeypatch, self_check.Kernels(forward, backward))
    expected, others = by_torch(monkeypatch), by_torch(monkeypatch, k=64)
    with caplog.at_level(logging.WARNING, self_check.__name__):
        assert same(train(), expected)
        compared = len(calls)
        assert same(train(), expected) and same(train(k=64), others)  # of no other kind either
    assert 1 <= compared == len(calls) <= 2
    assert len(caplog.messages) == 1 and said in caplog.text
    assert "(4 bits, rows of 96, torch.float32 to torch.float32, on cpu)" in caplog.text
    assert "QVGEN_KERNELS=reference" in caplog.text


def test_asked_for_by_name_a_wrong_kernel_is_an_error(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = by_torch(monkeypatch)
    kernels = right(calls)
    use(monkeypatch, self_check.Kernels(lambda *given: kernels.forward(*given) + 1, kernels.backward))
    monkeypatch.setenv(registry.ENVIRONMENT, "triton")
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"QVGEN_KERNELS=triton asks .*: outputs differ in 768 of 768.*; unset QVGEN_KERN"
        ):
            train()
    monkeypatch.delenv(registry.ENVIRONMENT)
    with caplog.at_level(logging.WARNING, self_check.__name__):
        assert same(train(), expected) and len(caplog.messages) == 1


def test_asked_for_by_name_kernels_that_are_missing_are_an_error(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "missing", lambda _: "triton is not installed")
    train()
    monkeypatch.setenv(registry.ENVIRONMENT, "triton")
    with pytest.raises(RuntimeError, match="asks for kernels that cannot run: triton is not installed"):
        train()
    monkeypatch.setenv(registry.ENVIRONMENT, "reference")
    train()
    assert not calls


def test_running_out_of_memory_is_no_verdict(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(launch, "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            train()
    train()
    assert calls == ["forward", "backward"] * 2


def test_the_check_leaves_random_numbers_and_defaults_alone(calls: list[str]) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            x = torch.ones(8, 96, device="cpu", dtype=torch.float32)
            assert self_check.agree(right(calls), x, ARGS, torch.bfloat16, True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state) and calls == ["forward", "backward"]
