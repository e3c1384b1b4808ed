"""The integer part of the cpu kernels: equal to numpy's int64 product, with and without Strassen's algorithm."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvgen.kernels.cpu import library
from qvgen.kernels.registry import KernelPreference
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.timestep import set_timestep
from qvgen.quant.scheme import QuantArgs
from tests.support.cpu_weights import prepared_weight, some_codes
from tests.support.packed_reference import GROUPS, build, inputs, scheme_of

KINDS = ("any", "extreme", "zero", "largest")
BITS = range(2, 9)
NEVER, AUTO, ALWAYS = 0, 1, 2  # modes of qvgen_use_strassen


def field_offsets(bits: int, n: int) -> np.ndarray:
    """What layout.h subtracts from the codes of each output."""
    field = np.arange(n) % 64 // 16
    offset = {2: np.where(field == 3, 2, 0), 4: np.where(field % 2, 8, 0), 8: np.full(n, 128)}
    return offset.get(bits, np.zeros(n, dtype=np.int64))


def check_product(isa: str, a: np.ndarray, q: np.ndarray, weight_bits: int, activation_bits: int) -> None:
    a_bytes, out = np.ascontiguousarray(a, dtype=np.uint8), np.full((len(a), len(q)), -1, dtype=np.int32)
    weight = prepared_weight(q, weight_bits).weight
    status = library.load().qvgen_integer_part(
        isa.encode(), weight.data_ptr(), weight.numel(), a_bytes.ctypes.data, len(a), 2**activation_bits - 1, out.ctypes.data
    )
    assert status == 0
    expected = a.astype(np.int64) @ (q - field_offsets(weight_bits, len(q))[:, None]).T
    wrong = np.argwhere(out != expected)
    assert not len(wrong), f"{len(wrong)} of {out.size} wrong, first (m, n): {wrong[0]}"


@pytest.mark.parametrize("activation_bits", BITS)
@pytest.mark.parametrize("weight_bits", BITS)
def test_every_pair_of_widths(isa: str, weight_bits: int, activation_bits: int) -> None:
    generator = np.random.default_rng(10 * weight_bits + activation_bits)
    for m, n, k in [(7, 70, 45), (2, 129, 72)]:
        for kinds in [("any", "any"), ("extreme", "extreme"), ("largest", "largest"), ("zero", "any"), ("any", "zero")]:
            a = some_codes(generator, (m, k), activation_bits, kinds[0])
            q = some_codes(generator, (n, k), weight_bits, kinds[1])
            check_product(isa, a, q, weight_bits, activation_bits)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weight_bits=st.sampled_from(BITS),
    activation_bits=st.sampled_from(BITS),
    m=st.integers(1, 13),
    n=st.integers(1, 200),
    k=st.integers(1, 300),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(
    isa: str, weight_bits: int, activation_bits: int, m: int, n: int, k: int, kinds: tuple[str, str], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    a = some_codes(generator, (m, k), activation_bits, kinds[0])
    q = some_codes(generator, (n, k), weight_bits, kinds[1])
    check_product(isa, a, q, weight_bits, activation_bits)


@pytest.mark.parametrize("bits", [(2, 8), (3, 8), (4, 4), (4, 8), (7, 8), (8, 8)], ids=lambda b: f"w{b[0]}a{b[1]}")
@pytest.mark.parametrize("shape", [(6, 64, 16384), (13, 65, 4096), (1, 1, 4096), (1, 1, 1), (5, 1, 8), (0, 64, 64)], ids=str)
def test_long_sums_aliased_rows_and_single_outputs(isa: str, shape: tuple[int, int, int], bits: tuple[int, int]) -> None:
    (m, n, k), (weight_bits, activation_bits) = shape, bits
    generator = np.random.default_rng(k)
    for kind in ("any", "extreme", "largest"):
        a = some_codes(generator, (m, k), activation_bits, kind)
        a[1::3] = 0
        check_product(isa, a, some_codes(generator, (n, k), weight_bits, kind), weight_bits, activation_bits)


def four_bit_layer(n: int, k: int, weight: QuantArgs, symmetric: bool) -> PackedLinear:
    layer, _ = build(scheme_of(weight, 4, 4, symmetric), n, k)
    layer.prepare_backend(KernelPreference.CPU)
    set_timestep(torch.tensor([0.0, 700.0]))
    return layer


# M per sample (of two), N, K: one block of 12 tokens and less, more than one, an incomplete last one, more than 66 of them.
@pytest.mark.parametrize("shape", [(1, 128, 16), (6, 128, 48), (7, 256, 32), (30, 100, 48), (397, 128, 80), (1000, 128, 16)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_strassen_changes_nothing(
    isa: str, strassen: Callable[[int], None], shape: tuple[int, int, int], symmetric: bool
) -> None:
    m, n, k = shape
    for weight in (QuantArgs(zero_point_domain="float"), QuantArgs(symmetric=True)):
        layer, x = four_bit_layer(n, k, weight, symmetric), inputs(2, m, k)
        strassen(NEVER)
        expected = layer(x)
        strassen(ALWAYS)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("ends", ["random", "quarters"])
def test_strassen_of_extreme_codes(isa: str, strassen: Callable[[int], None], ends: str) -> None:
    # Sums of quarters reach the ends of a signed byte where the quarters are all 0 or all 15.
    generator, half = torch.Generator().manual_seed(0), torch.cat((torch.zeros(1, 32), torch.ones(1, 32)), 1)
    clips, scheme = torch.ones(GROUPS), scheme_of(QuantArgs(), 4, 4, symmetric=False)
    for flip_tokens, flip_outputs in product((False, True), repeat=2):
        if ends == "random":
            x, q = (torch.randint(0, 2, (rows, 64), generator=generator) for rows in (24, 128))
        else:
            x = torch.cat(((1 - half if flip_tokens else half).expand(6, -1), half.expand(6, -1))).repeat(2, 1)
            q = torch.cat(((1 - half if flip_outputs else half).expand(64, -1), half.expand(64, -1)))
        codes = (15 * q).to(torch.uint8)
        grid = torch.ones(128, 1), torch.zeros(128, 1)
        layer = PackedLinear.from_codes(codes, *grid, clips, clips, None, scheme)
        layer.prepare_backend(KernelPreference.CPU)
        set_timestep(torch.tensor([0.0]))
        for mode in (NEVER, ALWAYS):
            strassen(mode)
            # A token of 0s and 1s has the scale 1/15: the sums of 225s come out as 15 times their number.
            counts = 15.0 * (x.float() @ q.float().T)
            torch.testing.assert_close(layer(x.float()[None])[0], counts, rtol=1e-6, atol=0)


def test_strassen_where_it_is_chosen(isa: str, strassen: Callable[[int], None]) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # with more, fewer panels are left for each and it is not chosen
        layer, x = four_bit_layer(512, 4096, QuantArgs(), symmetric=False), inputs(2, 130, 4096)
        strassen(NEVER)
        expected = layer(x)
        strassen(AUTO)
        assert torch.equal(layer(x), expected)
    finally:
        torch.set_num_threads(threads)
