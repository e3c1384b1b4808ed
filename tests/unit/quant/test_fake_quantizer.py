"""LSQ+ gradients of a weight's scale and zero point, against values worked out by hand."""

import math

import pytest
import torch

from qvgen.quant.fake_quantizer import WeightQuantizer
from qvgen.quant.scheme import QuantArgs

# Two bits, so that P = 3. Two rows of four.
WEIGHT = torch.tensor([[0.0, 1.0, 2.25, 9.0], [-5.0, 0.0, 1.0, 1.75]])
# With scale 1 and zero point 0 the codes are 0, 1, 2, 3 (9 is clamped) and 0 (-5 is clamped), 0, 1, 2.
# By the scale: inside the range round(w) - w, outside the code: 0, 0, -0.25, 3 and 0, 0, 0, 0.25.
BY_SCALE = torch.tensor([[0.0, 0.0, -0.25, 3.0], [0.0, 0.0, 0.0, 0.25]])
# By the zero point: inside 0, outside -scale.
BY_ZERO_POINT = torch.tensor([[0.0, 0.0, 0.0, -1.0], [-1.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    "strategy, size, rows, groups, shared",
    [("tensor", None, 1, 1, 8), ("channel", None, 2, 1, 4), ("group", 2, 2, 2, 2)],
)
def test_gradients_are_scaled_by_the_elements_that_share_a_scale(
    strategy: str, size: int | None, rows: int, groups: int, shared: int
) -> None:
    args = QuantArgs(num_bits=2, strategy=strategy, group_size=size, zero_point_domain="float")  # type: ignore[arg-type]
    quantizer = WeightQuantizer(args, torch.ones(rows, groups), torch.zeros(rows, groups))
    quantizer(WEIGHT).sum().backward()
    factor = 1 / math.sqrt(shared * 3)
    for parameter, by_element in ((quantizer.scale, BY_SCALE), (quantizer.zero_point, BY_ZERO_POINT)):
        expected = factor * by_element.reshape(rows, groups, -1).sum(-1)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("strategy, size, times", [("tensor", None, 1 / 4), ("channel", None, 1), ("group", 8, math.sqrt(8))])
def test_the_factor_over_that_of_a_channel(strategy: str, size: int | None, times: float) -> None:
    """16 x 64: one scale for all is moved by a quarter of 1 / sqrt(K P), groups of 8 by 2.83 times it."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    args = QuantArgs(strategy=strategy, group_size=size, symmetric=True)  # type: ignore[arg-type]
    quantizer = WeightQuantizer.min_max(args, weight)
    quantizer(weight).square().sum().backward()
    found = quantizer.scale.grad
    scale = quantizer.scale.detach().unsqueeze(-1)
    steps = weight.reshape(*scale.shape[:2], -1) / scale
    codes = steps.round().clamp(-8, 7)
    # d(s q)/ds = q - w / s inside the range, q outside; the loss is sum (s q)^2.
    by_element = 2 * scale * codes * (codes - torch.where(steps.round() == codes, steps, 0.0))
    expected = times / math.sqrt(64 * 15) * by_element.sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
