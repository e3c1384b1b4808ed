"""Attention with scores of 8-bit codes, against attention in float64 and against the expression that defines it."""

import pytest
import torch
import torch.nn.functional as F

from qvgen.kernels import expressions
from qvgen.kernels.expressions import KEYS_TOGETHER
from qvgen.kernels.triton.attention import launch
from qvgen.quant.primitives import codes, range_to_grid

# Of the norm of the result. Half a step of a code is 1/254 of the largest of 64 to 128 normal values, about 3 of them: scores
# of normal q and k move by about .01, and so do probabilities.
OF_EXACT = 0.015
OF_REFERENCE = 2**-10  # probabilities and result are each rounded to float16, which is within 2^-11


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


def distance(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


# The last block of queries and of keys is whole, has one token, or is the only one; heads fill a tile, or do not.
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "size"),
    [(130, 130, 2, 64), (5, 129, 1, 128), (128, 64, 1, 72), (3, 1, 2, 16), (129, 40, 1, 32)],
)
def test_near_attention_and_as_its_definition(queries: int, keys: int, heads: int, size: int, device: str) -> None:
    q, k, v = (normal(2, tokens, heads, size, seed=i) for i, tokens in enumerate((queries, keys, keys)))
    k += 8 * normal(size, seed=3)  # what all keys share, and 8 bits would be lost for
    y = launch.attention_int8(*(t.to(device) for t in (q, k, v))).cpu()
    assert y.dtype == torch.float16 and y.is_contiguous()
    exact = F.scaled_dot_product_attention(*(t.transpose(1, 2).double() for t in (q, k, v))).transpose(1, 2)
    assert distance(y, exact) < OF_EXACT
    assert distance(y, expressions.attention_int8(q.float(), k.float(), v.float())) < OF_REFERENCE


def test_any_strides_and_scores_of_any_size(device: str) -> None:
    joined = normal(1, 70, 2, 3 * 32, seed=4).to(device)
    q, k, v = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in joined.chunk(3, -1))
    expected = launch.attention_int8(q, k, v)
    assert torch.equal(launch.attention_int8(*joined.chunk(3, -1)), expected)
    assert torch.equal(launch.attention_int8(q.mT.contiguous().mT, k, v), expected)
    largest, none = launch.attention_int8(60 * q, 60 * k, v), launch.attention_int8(0 * q, k, v)
    assert largest.isfinite().all() and distance(none, v.mean(1, keepdim=True).expand_as(v)) < OF_REFERENCE


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_what_it_must(value: float, device: str) -> None:
    q, k, v = (normal(1, 70, 2, 32, seed=i).to(device) for i in range(3))
    expected = launch.attention_int8(q, k, v)
    q[0, 66, 1, 5] = value
    y = launch.attention_int8(q, k, v)
    assert y[0, 66, 1].isnan().all()
    y[0, 66, 1] = expected[0, 66, 1]
    assert torch.equal(y, expected)
    k[0, 3, 0, 0] = value  # all queries of that head look at it
    y = launch.attention_int8(q, k, v)
    assert y[:, :, 0].isnan().all() and torch.equal(y[:, :66, 1], expected[:, :66, 1])


def test_codes_are_those_of_fake_quantization(device: str) -> None:
    x = normal(2, 70, 2, 24, seed=6)
    x[0, 5] = 0
    ours, scale = launch._eight_bits(x.to(device), None, 32)
    largest = x.float().abs().amax(-1, keepdim=True)
    grid = range_to_grid(-largest, largest, expressions._EIGHT_BITS)
    expected = codes(x.float(), *grid, expressions._EIGHT_BITS) - 128
    ours, scale = ours.cpu().view(2, 2, 70, 32), scale.cpu().view(2, 2, 70)
    assert torch.equal(ours[..., :24].transpose(1, 2).float(), expected) and not ours[..., 24:].any()
    assert torch.equal(scale.transpose(1, 2), grid[0][..., 0])
    _, shared = launch._eight_bits(x.to(device), torch.zeros(2, 2, 24, device=device), 32)
    first = largest[:, :KEYS_TOGETHER, :, 0].amax(1, keepdim=True) / 127
    assert torch.equal(shared.cpu().view(2, 2, 70).transpose(1, 2)[:, :KEYS_TOGETHER], first.expand(-1, KEYS_TOGETHER, -1))
