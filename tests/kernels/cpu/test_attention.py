"""Attention in each compiled kernel that can run here, that for short sequences in each instruction set, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qvgen.kernels.cpu import block_functions, library
from qvgen.kernels.cpu.block_functions import attention, short_attention

WIDTHS = (16, 64, 80, 128, 256)  # of heads


def _kernels() -> list[str]:
    try:
        return library.attention_kernels(WIDTHS[0]) or ["none"]
    except library.LibraryMissing:
        return ["none"]  # and conftest.py skips the tests


def _id(name: str) -> str:
    return f"{name}-emulated" if name != "none" and library.load().qvgen_isa_emulated(name.encode()) else name


@pytest.fixture(params=_kernels(), ids=_id)
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "none":
        pytest.skip("the compiled attention needs AVX512_BF16 or AMX, which this machine does not have")
    return request.param


def inputs(
    samples: int, queries: int, keys: int, heads: int, width: int, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries + keys + width)
    shapes = [(samples, tokens, heads, width) for tokens in (queries, keys, keys)]
    q, k, v = ((spread * torch.randn(shape, generator=generator)).bfloat16() for shape in shapes)
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2).double() for t in (q, k, v))).transpose(1, 2)


# Samples, queries, keys, heads.
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (2, 32, 64, 2),  # whole tiles
        (1, 33, 65, 2),  # a row and a key more
        (1, 70, 512, 1),  # a whole block of keys
        (2, 7, 513, 1),  # two blocks, in odd parts
        (1, 200, 77, 3),  # more queries than a thread takes at a time
        (1, 40, 1560, 1),  # four blocks of keys
    ],
    ids=str,
)
@pytest.mark.parametrize("width", WIDTHS)
def test_against_float64(kernel: str, shape: tuple[int, int, int, int], width: int) -> None:
    for spread in (0.1, 1.0, 6.0):  # probabilities that are equal, and that are one 1 and zeros
        q, k, v = inputs(*shape, width, spread)
        # Probabilities and result are each rounded to 8 bits of mantissa.
        assert (attention(q, k, v, kernel).double() - exact(q, k, v)).abs().max() <= 2 * 2**-8 * v.double().abs().max()


@pytest.mark.parametrize("width", [80, 128])
def test_any_number_of_threads(kernel: str, width: int) -> None:
    q, k, v = inputs(1, 420, 300, 2, width)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attention(q, k, v, kernel))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_nan_stays_in_its_queries(kernel: str) -> None:
    q, k, v = inputs(1, 70, 130, 2, 64)
    expected = attention(q, k, v, kernel)
    q[0, 40, 1, 3] = torch.nan
    result = attention(q, k, v, kernel)
    assert result[0, 40, 1].isnan().all()
    result[0, 40, 1] = expected[0, 40, 1]
    assert torch.equal(result, expected)


def test_large_scores_do_not_overflow(kernel: str) -> None:
    q, k, v = inputs(1, 33, 600, 1, 128, spread=1e4)
    assert attention(q, k, v, kernel).isfinite().all()


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (2, 48, 12, 4), (1, 6, 64, 2), (1, 7, 65, 2), (1, 48, 48, 4), (1, 100, 511, 1), (1, 9, 512, 3)],
    ids=str,
)
@pytest.mark.parametrize("width", [16, 32, 80, 256])
def test_short_against_float64(isa: str, shape: tuple[int, int, int, int], width: int) -> None:
    for spread in (0.1, 1.0, 6.0, 1e4):
        q, k, v = inputs(*shape, width, spread)
        scores = (q.double().abs().sum(-1).max() * k.double().abs().max()).item()
        largest = float(v.double().abs().max())
        # Of the score, whose error e^x makes a relative one; of the exponential (2e-7); of sums over keys.
        error = largest * (width * 2**-24 * scores / width**0.5 + 2e-6)
        assert (short_attention(q.float(), k.float(), v.float()).double() - exact(q, k, v)).abs().max() <= error
        assert (short_attention(q, k, v).double() - exact(q, k, v)).abs().max() <= error + 2**-8 * largest


def test_short_with_any_number_of_threads_and_nan(isa: str) -> None:
    q, k, v = (t.float() for t in inputs(2, 60, 130, 6, 64))
    expected, before = short_attention(q, k, v), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(short_attention(q, k, v), expected)
    finally:
        torch.set_num_threads(before)
    q[0, 40, 1, 3] = torch.nan
    result = short_attention(q, k, v)
    assert result[0, 40, 1].isnan().all()
    result[0, 40, 1] = expected[0, 40, 1]
    assert torch.equal(result, expected)


def test_what_the_short_kernel_does_not_take() -> None:
    rand = torch.ones
    for keys, width, dtype in (
        (513, 64, torch.float32),
        (5, 72, torch.float32),
        (5, 272, torch.float32),
        (5, 64, torch.float64),
    ):
        q = rand(1, keys, 1, width, dtype=dtype)
        assert not block_functions.is_short(dtype, 7, keys, width) and not block_functions.attention_supported(q, q, q)
    q, arguments = rand(1, 4, 1, 24), (1, 4, 4, 1, 24, 0.2)
    status = library.load().qvgen_short_attention(library.isa(), 0, *[q.data_ptr()] * 3, *arguments, q.data_ptr(), 1)
    assert "instruction set" in library.ERRORS[status]
