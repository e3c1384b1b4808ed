import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvgen.packing.bits import MAX_BITS, MIN_BITS, pack, packed_words, unpack

WIDTHS = range(MIN_BITS, MAX_BITS + 1)


def random_codes(n: int, k: int, num_bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**num_bits, (n, k), dtype=torch.uint8, generator=generator)


def stream_of(row: list[int], num_bits: int) -> bytes:
    """The definition: one big integer, code k at bit k * num_bits, as little-endian 32-bit words."""
    number = sum(code << (k * num_bits) for k, code in enumerate(row))
    return number.to_bytes(4 * packed_words(len(row), num_bits), "little")


@pytest.mark.parametrize("num_bits", WIDTHS)
@pytest.mark.parametrize("k", [0, 1, 2, 3, 5, 7, 8, 9, 10, 11, 16, 31, 32, 33, 63, 64, 65, 100])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_round_trip(num_bits: int, n: int, k: int) -> None:
    codes = random_codes(n, k, num_bits)
    words = pack(codes, num_bits)
    assert words.shape == (n, -(-k * num_bits // 32))
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, num_bits, k), codes)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(WIDTHS), st.data())
def test_bytes_follow_the_definition(num_bits: int, data: st.DataObject) -> None:
    row = data.draw(st.lists(st.integers(0, 2**num_bits - 1), min_size=1, max_size=70))
    words = pack(torch.tensor([row], dtype=torch.uint8), num_bits)
    assert words.numpy().tobytes() == stream_of(row, num_bits)


def test_four_bits_are_nibbles_low_first() -> None:
    words = pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]], dtype=torch.uint8), 4)
    assert words.view(torch.int32).item() == np.array([0xF7654321], dtype=np.uint32).view(np.int32)[0]


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_any_strides(num_bits: int) -> None:
    codes = random_codes(33, 5, num_bits)
    assert torch.equal(pack(codes.T, num_bits), pack(codes.T.contiguous(), num_bits))
    words = pack(codes, num_bits)
    padded = torch.zeros(33, 2 * words.shape[1], dtype=torch.int32)
    padded[:, ::2] = words
    assert torch.equal(unpack(padded[:, ::2], num_bits, 5), codes)
    assert torch.equal(unpack(padded[:1, ::2], num_bits, 5), codes[:1])


def test_errors_name_limit_value_and_remedy() -> None:
    with pytest.raises(ValueError, match=r"at most 7, found 9: clamp them"):
        pack(torch.tensor([[1, 9]], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="2 to 8 bits, not 9"):
        pack(torch.zeros(1, 1, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match=r"uint8 tensor of shape \(N, K\), not torch.int64"):
        pack(torch.zeros(1, 1, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"33 codes of 4 bits take 5 int32 words per row, found torch.int32 \(1, 4\)"):
        unpack(torch.zeros(1, 4, dtype=torch.int32), 4, 33)
