"""What the ops between linear layers are given: tensors of any strides, wrong ones, and any number of threads."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qvgen.kernels import block_ops
from qvgen.kernels.cpu import library

# PyTorch sums what is not contiguous in another order; compiled kernels read a contiguous copy.
FLOAT32, BFLOAT16 = 2e-5, 2**-6

pytestmark = pytest.mark.skipif(bool(library.refusal()), reason="the compiled kernels are not installed")

N, S, HEADS, SIZE = 2, 37, 3, 32
D = HEADS * SIZE


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values with other strides."""
    yield "transposed", tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if tensor.ndim > 2:
        yield "tokens apart", tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield "sliced", torch.cat([tensor, tensor + 1], -1)[..., : tensor.shape[-1]]
    every_second = torch.stack([tensor, tensor + 1], -1).flatten(-2)[..., ::2]
    yield "every second", every_second
    yield "an offset", torch.cat([tensor.flatten()[:3], tensor.flatten()])[3:].view(tensor.shape)


def calls(dtype: torch.dtype) -> dict[str, list[Any]]:
    x, y, gate = rand(N, S, D).to(dtype), rand(N, S, D, seed=1).to(dtype), rand(N, S, D, seed=2)
    weight, bias, shift = rand(D, seed=3), rand(D, seed=4).to(dtype), rand(N, 1, D, seed=5)
    angle = rand(1, S, 1, SIZE // 2, seed=6).repeat_interleave(2, -1)
    q, k, v = (rand(N, tokens, HEADS, SIZE, seed=7 + i).to(dtype) for i, tokens in enumerate((S, 11, 11)))
    return {
        "layer_norm_modulate": [x, weight, bias, shift, shift + 1, 1e-6],
        "rms_norm_rotary": [x, weight, angle.cos(), angle.sin(), HEADS, 1e-6],
        "add_gated": [x, y, gate],
        "attention": [q, k, v],
    }


OPS = list(calls(torch.float32))


def op_of(name: str) -> Callable[..., Tensor]:
    return getattr(block_ops, name)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QVGEN_KERNELS", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_tensors_of_any_strides(backend: str, name: str, dtype: torch.dtype) -> None:
    op, arguments = op_of(name), calls(dtype)[name]
    expected = op(*arguments)
    compiled = backend == "cpu" and name != "attention"  # which may be PyTorch's
    tolerance = 0.0 if compiled else FLOAT32 if dtype == torch.float32 else BFLOAT16
    for place, tensor in enumerate(arguments):
        if isinstance(tensor, Tensor):
            for kind, same in layouts(tensor):
                result = op(*arguments[:place], same, *arguments[place + 1 :])
                assert result.is_contiguous(), kind
                torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, msg=f"argument {place}, {kind}")


@pytest.mark.parametrize("name", OPS)
def test_one_value_for_all_places(backend: str, name: str) -> None:
    """Strides of 0."""
    op, arguments = op_of(name), calls(torch.float32)[name]
    for place, tensor in enumerate(arguments):
        if isinstance(tensor, Tensor):
            one = torch.full((), 0.7).expand(tensor.shape)
            result, expected = (op(*arguments[:place], t, *arguments[place + 1 :]) for t in (one, one.contiguous()))
            torch.testing.assert_close(result, expected, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads(isa: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "attention" and not (dtype == torch.bfloat16 and library.attention_kernels(SIZE)):
        pytest.skip("PyTorch's attention runs here, whose rounding may depend on threads (docs/kernels.md)")
    monkeypatch.setenv("QVGEN_KERNELS", "cpu")
    arguments = [
        t if not isinstance(t, Tensor) or t.shape[1:2] != (S,) else t.repeat(1, 20, *[1] * (t.ndim - 2))
        for t in calls(dtype)[name]
    ]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(op_of(name)(*arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


WRONG: list[tuple[str, Callable[[list[Any]], Any], str]] = [
    ("layer_norm_modulate", lambda a: [None, *a[1:]], "x must be dense, .* not missing"),
    ("layer_norm_modulate", lambda a: [a[0][..., :0], *a[1:]], r"d > 0, not torch.float32 \(2, 37, 0\)"),
    ("layer_norm_modulate", lambda a: [a[0].int(), *a[1:]], "x must be dense, floating point"),
    ("layer_norm_modulate", lambda a: [a[0], a[1][:-1], *a[2:]], r"weight must be floating point of shape \(96,\)"),
    ("layer_norm_modulate", lambda a: [*a[:3], a[3].long(), *a[4:]], "scale must be floating point of shape"),
    ("layer_norm_modulate", lambda a: [*a[:3], rand(N, S, D), *a[4:]], "scale and shift must have one shape"),
    ("layer_norm_modulate", lambda a: [*a[:2], a[2].to_sparse(), *a[3:]], "bias must be a dense tensor on cpu"),
    ("rms_norm_rotary", lambda a: [*a[:4], 5, a[5]], "96 features are not 5 heads of one size"),
    ("rms_norm_rotary", lambda a: [*a[:4], 0, a[5]], "96 features are not 0 heads of one size"),
    ("rms_norm_rotary", lambda a: [*a[:3], None, *a[4:]], "cosine and sine belong together"),
    ("rms_norm_rotary", lambda a: [*a[:2], a[2][:, :-1], *a[3:]], r"cosine must be floating point of shape \(1, 37, 1, 32\)"),
    ("rms_norm_rotary", lambda a: [*a[:3], a[3].long(), *a[4:]], "sine must be floating point of shape"),
    ("add_gated", lambda a: [a[0], a[1][:, 1:], a[2]], r"y must be floating point of shape \(2, 37, 96\)"),
    ("add_gated", lambda a: [a[0], None, a[2]], "y must be floating point of shape .* not missing"),
    ("add_gated", lambda a: [a[0], a[1], a[2][:, :5]], r"gate must be floating point of shape \(2, 1, 96\) or \(2, 37, 96\)"),
    (
        "add_gated",
        lambda a: [*a[:2], torch.empty_like(a[2], device="meta")],
        "gate must be a dense tensor on cpu, not .* on meta",
    ),
    ("attention", lambda a: [a[0], a[1], a[2].bfloat16()], "must have one dtype"),
    ("attention", lambda a: [a[0], a[1], a[2][:, 1:]], "must have one dtype"),
    ("attention", lambda a: [a[0][..., :-1], *a[1:]], "must agree in samples, heads and features"),
    ("attention", lambda a: [a[0], None, a[2]], "attention needs q, k and v, and one is missing"),
    ("attention", lambda a: [t.int() for t in a], "must agree in samples, heads and features"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), WRONG, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(WRONG)])
def test_wrong_tensors_are_told(backend: str, name: str, spoil: Callable[[list[Any]], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op_of(name)(*spoil(calls(torch.float32)[name]))
