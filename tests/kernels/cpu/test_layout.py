"""Prepared weights: their size, and the way back to the stored words."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvgen.kernels.cpu.backend import CpuBackend
from qvgen.packing.bits import unpack
from tests.support.cpu_weights import prepared_weight, some_codes, stored_weight

PANEL, STEP = 64, 8  # outputs and k that are padded to
HEADER_BYTES, GRID_BYTES = 64, 16  # once; per output and group: scale, row sum, zero point in two parts


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@pytest.mark.parametrize(("bits", "stored_bits"), [(2, 2), (3, 3), (4, 4), (5, 8), (6, 8), (7, 8), (8, 8)])
@pytest.mark.parametrize(("n", "k", "groups"), [(64, 8, 1), (1536, 1536, 1), (1, 1, 1), (65, 33, 3), (200, 320, 10)])
def test_bits_per_weight(bits: int, stored_bits: int, n: int, k: int, groups: int) -> None:
    codes_bits = stored_bits * padded(n, PANEL) * groups * padded(k // groups, STEP)
    assert codes_bits % 8 == 0
    weight = prepared_weight(np.zeros((n, k)), bits, groups).weight
    assert weight.nbytes == HEADER_BYTES + codes_bits // 8 + GRID_BYTES * padded(n, PANEL) * groups


def test_panels_start_at_a_cache_line() -> None:
    for n, k in [(1, 1), (65, 33), (300, 100)]:
        assert prepared_weight(np.zeros((n, k)), 4).weight.data_ptr() % 64 == 0


@settings(deadline=None, max_examples=200)
@given(
    bits=st.integers(2, 8),
    n=st.integers(1, 200),
    size=st.integers(2, 80),
    groups=st.integers(1, 5),
    kind=st.sampled_from(["any", "extreme", "zero", "largest"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpacked_words_are_those_that_were_packed(bits: int, n: int, size: int, groups: int, kind: str, seed: int) -> None:
    codes = some_codes(np.random.default_rng(seed), (n, groups * size), bits, kind)
    stored, backend = stored_weight(codes, bits, groups), CpuBackend()
    words = backend.stored_words(backend.prepare(stored), groups * size, bits)
    assert torch.equal(words, stored.words)
    assert np.array_equal(unpack(words, bits, groups * size).numpy(), codes)


@settings(deadline=None, max_examples=50)
@given(bits=st.integers(2, 8), n=st.integers(1, 70), k=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_each_code_changes_the_panels(bits: int, n: int, k: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    codes = some_codes(generator, (n, k), bits, "any")
    before = prepared_weight(codes, bits).weight
    codes[generator.integers(n), generator.integers(k)] ^= 1
    assert not torch.equal(prepared_weight(codes, bits).weight, before)


def test_preparing_leaves_the_stored_weight_alone() -> None:
    stored = stored_weight(some_codes(np.random.default_rng(0), (70, 33), 4, "any"), 4)
    before = [t.clone() for t in (stored.words, stored.scale, stored.zero_point, stored.row_sum) if t is not None]
    CpuBackend().prepare(stored)
    after = [t for t in (stored.words, stored.scale, stored.zero_point, stored.row_sum) if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
