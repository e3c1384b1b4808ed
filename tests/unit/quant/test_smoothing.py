"""Smoothing by its formula, the low-rank factors against a full SVD, and both leave the layer's function alone."""

import pytest
import torch

from qvgen.quant.grid import LayerGrid
from qvgen.quant.low_rank import low_rank_factors
from qvgen.quant.rotation import rotate
from qvgen.quant.scheme import QuantScheme
from qvgen.quant.smoothing import smoothing_scale, transform_input, transform_weight

# Float32 sums in another order, relative to the largest value.
SUMS = 1e-5
# The factors are rounded to bfloat16: the best approximation is missed by a thousandth of what is left at most.
ROUNDED_FACTORS = 1e-3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_scale_is_the_formula() -> None:
    weight = torch.tensor([[0.5, -4.0, 1.0], [-0.25, 1.0, 1.0]])
    largest = torch.tensor([8.0, 1.0, 9.0])
    # max|W| is 0.5, 4, 1: sqrt(8 / 0.5) = 4, sqrt(1 / 4) = 0.5, sqrt(9 / 1) = 3.
    torch.testing.assert_close(smoothing_scale(largest, weight, 0.5), torch.tensor([4.0, 0.5, 3.0]))
    torch.testing.assert_close(smoothing_scale(largest, weight, 1.0), largest)
    torch.testing.assert_close(smoothing_scale(largest, weight, 0.0), torch.tensor([2.0, 0.25, 1.0]))


def test_a_dead_channel_is_left_alone() -> None:
    weight = torch.tensor([[1.0, 0.0, 1.0]])
    scale = smoothing_scale(torch.tensor([0.0, 5.0, 4.0]), weight, 0.5)
    assert torch.equal(scale, torch.tensor([1.0, 1.0, 2.0]))


@pytest.mark.parametrize("rotation", [None, 16])
@pytest.mark.parametrize("scaled", [False, True])
def test_transformed_both_ways_the_layer_computes_the_same(scaled: bool, rotation: int | None) -> None:
    x, weight = normal(2, 7, 48), normal(20, 48, seed=1)
    x[..., 3] *= 50
    scale = smoothing_scale(x.abs().amax((0, 1)), weight, 0.6) if scaled else None
    expected = x @ weight.T
    found = transform_input(x, scale, rotation) @ transform_weight(weight, scale, rotation).T
    torch.testing.assert_close(found, expected, rtol=SUMS, atol=SUMS * float(expected.abs().max()))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_factors_are_the_best_approximation(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    up, down = low_rank_factors(weight, 3)
    assert up.shape == (shape[0], 3) and down.shape == (3, shape[1])
    best = torch.linalg.svdvals(weight)[3:].norm()
    assert best <= (weight - up @ down).norm() < (1 + ROUNDED_FACTORS) * best


def test_factors_survive_16_bits_and_zeros() -> None:
    for weight in (normal(24, 40), 1e-3 * normal(40, 24), torch.zeros(8, 8)):
        for factor in low_rank_factors(weight, 2):
            assert torch.equal(factor.bfloat16().float(), factor)
            assert factor.isfinite().all()


@pytest.mark.parametrize("rotation", [None, 8])
def test_residual_and_branch_are_the_transformed_weight(rotation: int | None) -> None:
    """W_residual + L1 L2 == W diag(s), rotated: in float64, so that only the residual's own rounding is left."""
    weight, scale = normal(32, 48), torch.rand(48) + 0.5
    scheme = QuantScheme(input_scaling=True, low_rank=2, input_rotation=rotation)
    whole = weight * scale if rotation is None else rotate(weight * scale, rotation)
    up, down = low_rank_factors(whole, 2)
    grid = LayerGrid(torch.ones(32, 1), torch.zeros(32, 1), None, None, scale, up, down)
    sum_ = grid.residual(weight, scheme).double() + up.double() @ down.double()
    # One rounding of the product, one of the difference.
    assert ((sum_ - whole.double()).abs() <= 4 * torch.finfo(torch.float32).eps * whole.abs().max()).all()
