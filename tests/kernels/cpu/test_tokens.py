"""Quantization of tokens in the cpu kernels: bit for bit that of qvgen/quant."""

import ctypes
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qvgen.kernels.cpu import library
from qvgen.kernels.registry import KernelPreference
from qvgen.nn.timestep import set_timestep
from qvgen.quant.primitives import codes, token_grid
from qvgen.quant.scheme import QuantArgs
from tests.support.cpu_weights import prepared_weight
from tests.support.packed_reference import build, inputs, scheme_of

F32 = np.float32
LARGEST, DENORMAL = float(np.finfo(F32).max), float(np.finfo(F32).smallest_subnormal)
PER_TEST = settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])

widths = st.integers(2, 8)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)
near_one = st.floats(-8, 8, width=32)
multiples = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, 2.5, -2.5, 7.0, 7.5, -8.0, 15.0, 255.0])
extremes = st.sampled_from([0.0, -0.0, DENORMAL, -DENORMAL, 1e-38, LARGEST, -LARGEST, 1e30, -1e30, 1.0])
# 32 is what the kernels take at a time; 1024, how often they decide whether to divide.
lengths = st.one_of(st.integers(1, 100), st.sampled_from([1023, 1024, 1025, 2080]))


def quantized(
    isa: str, x: torch.Tensor, clips: torch.Tensor, group: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, ...]:
    """Codes (n, m, K), scale, zero point and sum of codes (n, m, 1) of x (n, m, K); clips (2, timestep groups)."""
    n, m, k = x.shape
    weight = prepared_weight(np.zeros((1, k)), 4).weight
    layer = library.Layer(
        weight=weight.data_ptr(),
        weight_bytes=weight.numel(),
        clip_lower=clips[0].data_ptr(),
        clip_upper=clips[1].data_ptr(),
        in_features=k,
        out_features=1,
        groups=1,
        clips=clips.shape[1],
        activation_bits=bits,
        activation_symmetric=symmetric,
    )
    source = library.Input(
        x=x.data_ptr(),
        samples=n,
        tokens=m,
        timestep_group=group.data_ptr(),
        timestep_groups=len(group),
        dtype=int(x.dtype == torch.bfloat16),
    )
    q, scale = torch.full((n, m, k), 99, dtype=torch.uint8), torch.zeros(n, m, 1)
    zero_point, total = (torch.zeros(n, m, 1, dtype=torch.int32) for _ in range(2))
    arguments = ctypes.byref(layer), ctypes.byref(source), *(t.data_ptr() for t in (q, scale, zero_point, total))
    library.check(library.load().qvgen_quantize_tokens(isa.encode(), *arguments))
    return q, scale, zero_point, total


def check_tokens(
    isa: str,
    x: torch.Tensor,
    bits: int,
    symmetric: bool,
    clips: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
) -> torch.Tensor:
    """Assert that tokens are quantized as by qvgen/quant. Returns their scales."""
    clips = torch.ones(2, 1) if clips is None else clips
    group = torch.zeros(1, dtype=torch.int64) if group is None else group
    args = QuantArgs(num_bits=bits, symmetric=symmetric, strategy="token")
    lower, upper = (clip[group].view(-1, 1, 1) for clip in clips)
    expected_scale, expected_zero_point = token_grid(x.float(), lower, upper, args)
    expected = codes(x.float(), expected_scale, expected_zero_point, args)

    q, scale, zero_point, total = quantized(isa, x, clips, group, bits, symmetric)
    assert torch.equal(scale.nan_to_num(-1), expected_scale.nan_to_num(-1))
    finite = expected_scale.isfinite().expand_as(scale)
    assert torch.equal(zero_point[finite].float(), expected_zero_point.expand_as(scale)[finite])
    wrong = (q != expected) & finite
    assert not wrong.any(), f"{x[wrong][0].item()!r}: code {q[wrong][0]}, not {expected[wrong][0]}"
    assert torch.equal(total, q.sum(-1, keepdim=True, dtype=torch.int32))
    return scale


@PER_TEST
@given(
    values=st.one_of(*(st.lists(v, min_size=1, max_size=70) for v in (any_float, near_one, multiples, extremes))),
    bits=widths,
    symmetric=st.booleans(),
    dtype=dtypes,
)
@example([LARGEST, -LARGEST], 8, False, torch.float32)
@example([-0.0], 4, False, torch.float32)
@example([DENORMAL, -DENORMAL, 0.0], 2, True, torch.float32)
def test_any_values(isa: str, values: list[float], bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    x = torch.tensor(values)[None, None].to(dtype)
    x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)  # the largest float32 is Inf as bfloat16
    check_tokens(isa, x, bits, symmetric)


@PER_TEST
@given(
    k=lengths,
    shift=st.sampled_from([0.0, 0.5, 3.0, -3.0]),
    exponent=st.one_of(st.integers(-6, 6), st.integers(-148, 120)),
    bits=widths,
    symmetric=st.booleans(),
    dtype=dtypes,
    seed=st.integers(0, 2**32 - 1),
)
def test_random_tokens(
    isa: str, k: int, shift: float, exponent: int, bits: int, symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.ldexp(torch.randn(2, 3, k, generator=generator) + shift, torch.tensor(exponent)).to(dtype)
    clips, group = 0.3 + 0.7 * torch.rand(2, 4, generator=generator), torch.randint(0, 4, (2,), generator=generator)
    check_tokens(isa, x, bits, symmetric, clips, group)


@PER_TEST
@given(
    k=lengths.filter(lambda k: k > 2),
    bits=widths,
    symmetric=st.booleans(),
    exponent=st.integers(-130, 100),
    mantissa=st.one_of(st.just(1.0), st.floats(1, 2, width=32)),
    seed=st.integers(0, 2**32 - 1),
)
def test_ties_and_their_neighbours(
    isa: str, k: int, bits: int, symmetric: bool, exponent: int, mantissa: float, seed: int
) -> None:
    # x / s = code + 1/2 as nearly as floats allow: there the product with 1 / s falls to the other side now and then.
    generator, top = np.random.default_rng(seed), 2**bits - 1
    scale = F32(math.ldexp(mantissa, exponent))
    low = -(2 ** (bits - 1)) if symmetric else -int(generator.integers(0, top + 1))
    halves = generator.integers(low, low + top, k) + 0.5
    x = (scale * halves).astype(F32)
    for _ in range(2):
        x = np.where(generator.integers(0, 3, k) == 0, np.nextafter(x, F32(np.inf)), x)
        x = np.where(generator.integers(0, 3, k) == 0, np.nextafter(x, F32(-np.inf)), x)
    # Both ends of the range make `scale` the scale of the token, or a neighbour of it.
    x[0], x[-1] = scale * F32(low + (1 if symmetric else 0)), scale * F32(low + top)
    check_tokens(isa, torch.from_numpy(x)[None, None], bits, symmetric)


def test_exact_ties_go_to_even(isa: str) -> None:
    for bits in range(2, 9):
        top = 2**bits - 1
        x = torch.cat((torch.arange(top) + 0.5, torch.tensor([0.0, top])))[None, None]
        q, scale, zero_point, _ = quantized(isa, x, torch.ones(2, 1), torch.zeros(1, dtype=torch.int64), bits, False)
        assert (scale.item(), zero_point.item()) == (1.0, 0)
        assert q.flatten().tolist() == [i + i % 2 for i in range(top)] + [0, top]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, -0.0, 5.5, -5.5, 1e-42, -1e-42, DENORMAL, 1e-38, LARGEST, -LARGEST])
def test_constant_tokens(isa: str, value: float, symmetric: bool) -> None:
    for bits in range(2, 9):
        for k in (1, 7, 32, 33, 1025):
            scale = check_tokens(isa, torch.full((1, 1, k), value), bits, symmetric)
            assert scale.item() > 0
            assert value != 0 or scale.item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_tokens(isa: str, sign: int, dtype: torch.dtype) -> None:
    x = (sign * (5 + torch.rand(1, 4, 100, generator=torch.Generator().manual_seed(0)))).to(dtype)
    for bits in range(2, 9):
        check_tokens(isa, x, bits, symmetric=False)
        check_tokens(isa, x, bits, symmetric=True)


# The NaN with all bits set would round to -0.0 in bfloat16.
NOT_FINITE = {
    "inf": 0x7F800000,
    "-inf": 0xFF800000,
    "nan": 0x7FC00000,
    "nan-all-bits": 0x7FFFFFFF,
    "-nan-all-bits": 0xFFFFFFFF,
}


@pytest.mark.parametrize("bits", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_not_finite_makes_its_token_nan_and_no_other(
    isa: str, symmetric: bool, dtype: torch.dtype, out_dtype: torch.dtype, bits: int
) -> None:
    poison = torch.tensor([bits]).to(torch.uint32).view(torch.float32)
    weights = [QuantArgs(zero_point_domain="float"), QuantArgs(strategy="group", group_size=50)]
    for weight, width in [(weights[0], 4), (weights[1], 4), (weights[0], 8)]:
        layer, _ = build(scheme_of(weight, width, width, symmetric), 70, 350)
        layer.prepare_backend(KernelPreference.CPU)
        set_timestep(torch.tensor([500.0]))
        clean = inputs(2, 7, 350).to(dtype)
        dirty, tokens = clean.clone(), torch.zeros(2, 7, dtype=torch.bool)
        for at in [(0, 0, 0), (0, 6, 349), (1, 3, 320), (1, 5, 31)]:
            dirty[at], tokens[at[:2]] = poison.to(dtype)[0], True
        for gelu in (False, True):
            y, expected = (torch.empty(2, 7, 70, dtype=out_dtype) for _ in range(2))
            layer.forward_into(dirty, y, gelu)
            layer.forward_into(clean, expected, gelu)
            assert y[tokens].isnan().all()
            assert torch.equal(y[~tokens], expected[~tokens])
