"""The Hadamard rotation is orthogonal, in blocks, spreads outliers, and works in training after inference mode."""

import numpy as np
import pytest
import torch

from qvgen.quant.rotation import hadamard, rotate

EPS = 1e-6


def test_values_of_the_smallest() -> None:
    torch.testing.assert_close(hadamard(2), torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5)
    signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert torch.equal(hadamard(4), torch.tensor(signs) / 2)


@pytest.mark.parametrize("size", [2, 8, 64, 128, 512])
def test_is_sylvesters_matrix_orthogonal_and_symmetric(size: int) -> None:
    kronecker = np.ones((1, 1))
    while len(kronecker) < size:
        kronecker = np.kron(kronecker, [[1, 1], [1, -1]])
    h = hadamard(size)
    np.testing.assert_allclose(h.numpy() * size**0.5, kronecker, rtol=EPS)
    assert torch.equal(h, h.T)
    torch.testing.assert_close(h @ h, torch.eye(size), rtol=0, atol=EPS)


def test_blocks_are_apart() -> None:
    x = torch.zeros(3, 24)
    x[1, 9] = 1.0
    y = rotate(x, 8)
    assert torch.equal(y[1, 8:16], hadamard(8)[1])
    y[1, 8:16] = 0
    assert not y.any()
    assert rotate(torch.ones(2, 3, 24), 8).shape == (2, 3, 24)


def test_twice_is_nothing() -> None:
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(rotate(x, 16), 16), x, rtol=EPS, atol=EPS)


def test_an_outlier_is_spread_over_its_block() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 100.0
    assert rotate(x, 128).abs().max() < 0.15 * x.abs().max()


def test_what_inference_mode_made_can_be_trained_through() -> None:
    size = 256  # which no other test of this file has made before
    with torch.inference_mode():
        rotate(torch.ones(1, size), size)
    x = torch.ones(1, size, requires_grad=True)
    rotate(x, size)[0, 3].backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], hadamard(size)[3])
