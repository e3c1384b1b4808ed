"""Fake quantization in training, compiled: what PyTorch's operations compute, and where it runs."""

import pytest
import torch

from qvgen.kernels.cpu import library, training
from qvgen.kernels.registry import ENVIRONMENT
from qvgen.kernels.training import MOST_FEATURES, choose
from qvgen.quant.scheme import QuantArgs
from tests.support.fake_quantize import KINDS, check, check_layer, chosen, extremes, subject

FLOAT32 = [torch.float32]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("symmetric", "domain"), KINDS)
def test_every_grid_and_length(bits: int, symmetric: bool, domain: str, isa: str) -> None:
    args = QuantArgs(num_bits=bits, symmetric=symmetric, zero_point_domain=domain)  # type: ignore[arg-type]
    for k in (1, 7, 16, 33, 100, 1536):
        check(training, args, subject(k, args), FLOAT32)


@pytest.mark.parametrize(("symmetric", "domain"), KINDS)
def test_ties_extremes_and_nan(symmetric: bool, domain: str, isa: str) -> None:
    args = QuantArgs(num_bits=4, symmetric=symmetric, zero_point_domain=domain)  # type: ignore[arg-type]
    check(training, args, extremes(), FLOAT32)


def test_a_layer_in_training_gets_the_same_gradients(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_layer(training, monkeypatch)


def test_threads_and_instruction_sets_with_fused_multiply_add_give_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    args = QuantArgs(num_bits=4)
    x, scale, zero_point, _ = subject(777, args)
    x, scale, zero_point = (t.expand(40, -1, -1, -1).reshape(240, -1).contiguous() for t in (x, scale, zero_point))
    grad, found = torch.randn(x.shape), []
    for name in library.supported_isas():
        if name != "portable":
            monkeypatch.setattr(library, "isa", name.encode)
            for threads in (1, 3):
                monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                found.append(training.backward(grad, x, scale, zero_point, args))
    assert all(torch.equal(a, b) for others in found for a, b in zip(others, found[0], strict=True))


def test_rows_that_are_not_contiguous(isa: str) -> None:
    args = QuantArgs(num_bits=4)
    x, scale, zero_point, grad = subject(64, args)
    turned = (x.transpose(0, 1), scale.transpose(0, 1), zero_point.transpose(0, 1), grad[:1, :1, :1].expand(3, 2, 64))
    check(training, args, turned, FLOAT32)


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, args = torch.ones(2, 3, 8), QuantArgs(num_bits=4)
    assert chosen(x) is training and chosen(torch.nn.Parameter(x)) is training
    assert chosen(x.double()) is None and chosen(x.bfloat16()) is None and chosen(x, torch.bfloat16) is None
    assert chosen(torch.ones(1, MOST_FEATURES + 1)) is None and chosen(x[:0]) is None
    grid = torch.ones(2, 3, 1)
    assert choose(x, grid[:1], grid[:1], args, torch.float32) is None  # a grid for several rows
    assert choose(x, grid.double(), grid.double(), args, torch.float32) is None
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert chosen(x) is None


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operations, unless the kernels were asked for."""

    def missing() -> bytes:
        raise library.LibraryMissing("no compiler")

    monkeypatch.setattr(library, "isa", missing)
    assert chosen(torch.ones(2, 8)) is None
    monkeypatch.setenv(ENVIRONMENT, "cpu")
    with pytest.raises(library.LibraryMissing, match="no compiler"):
        chosen(torch.ones(2, 8))


def test_fake_tensors_and_compiled_code() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert chosen(torch.ones(2, 8)) is None
    taken: list[object] = []

    @torch.compile(backend="eager")
    def traced(x: torch.Tensor) -> torch.Tensor:
        taken.append(chosen(x))
        return x + 1

    traced(torch.ones(2, 8))
    assert taken == [None]
