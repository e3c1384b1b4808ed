"""Learned weight and activation quantizers: granularity, LSQ+ gradient scale, export equal to what training saw."""

import math

import pytest
import torch

from qvgen.quant.fake_quantizer import ActivationQuantizer, WeightQuantizer
from qvgen.quant.primitives import dequantize
from qvgen.quant.scheme import QuantArgs

WEIGHT_ARGS = [
    QuantArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size, zero_point_domain=domain)
    for bits in (2, 3, 4, 8)
    for symmetric, domain in ((False, "integer"), (False, "float"), (True, "integer"))
    for strategy, size in (("tensor", None), ("channel", None), ("group", 16))
]


def ids(args: QuantArgs) -> str:
    return f"{args.num_bits}-{'sym' if args.symmetric else args.zero_point_domain}-{args.strategy}"


def weight() -> torch.Tensor:
    return torch.randn(12, 48, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.mark.parametrize("args", WEIGHT_ARGS, ids=ids)
def test_export_equals_training_bit_for_bit(args: QuantArgs) -> None:
    w = weight()
    quantizer = WeightQuantizer.min_max(args, w)
    with torch.no_grad():  # as training leaves it: off the searched grid
        quantizer.scale.mul_(0.83)
        if quantizer.zero_point is not None:
            quantizer.zero_point.add_(0.37)
    scale, zero_point = quantizer.export()
    rows, groups = (1, 1) if args.strategy == "tensor" else (12, 3 if args.strategy == "group" else 1)
    assert scale.shape == (rows, groups)
    assert (zero_point is None) == args.symmetric
    q = quantizer.codes(w)
    assert q.dtype == torch.uint8 and q.shape == w.shape and int(q.max()) <= args.max_code
    grouped = q.view(1, 1, -1) if args.strategy == "tensor" else q.view(12, groups, -1)
    z = torch.tensor(float(args.symmetric_zero_point)) if zero_point is None else zero_point.unsqueeze(-1)
    assert torch.equal(dequantize(grouped, scale.unsqueeze(-1), z).view_as(w), quantizer(w))
    assert torch.equal(quantizer.dequantized(w), quantizer(w))
    if zero_point is not None and args.zero_point_domain == "integer":
        assert torch.equal(zero_point, zero_point.round())


def test_group_size_must_divide_the_inputs() -> None:
    with pytest.raises(ValueError, match="48 is not a multiple of group_size 20"):
        WeightQuantizer.min_max(QuantArgs(strategy="group", group_size=20), weight())


def test_gradients_are_scaled_by_one_over_sqrt_k_p() -> None:
    args = QuantArgs(num_bits=4, zero_point_domain="float")
    w = weight()
    quantizer = WeightQuantizer.min_max(args, w)
    quantizer(w).sum().backward()
    assert quantizer.scale.grad is not None
    s, z = quantizer.scale.detach(), quantizer.zero_point.detach()
    q = torch.round(w / s + z)
    inside = (q >= 0) & (q <= 15)
    by_hand = (q.clamp(0, 15) - z - torch.where(inside, w / s, 0.0)).sum(1, keepdim=True) / math.sqrt(48 * 15)
    torch.testing.assert_close(quantizer.scale.grad, by_hand, rtol=1e-3, atol=1e-4)


def test_each_sample_uses_the_clip_of_its_own_group() -> None:
    args = QuantArgs(strategy="token")
    lower, upper = torch.tensor([0.9, 0.5]), torch.tensor([0.9, 0.4])
    quantizer = ActivationQuantizer(args, lower, upper)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    both = quantizer(x, torch.tensor([0, 1]))
    assert torch.equal(both[:1], quantizer(x[:1], torch.tensor([0])))
    assert torch.equal(both[1:], quantizer(x[1:], torch.tensor([1])))
    assert not torch.equal(both[1:], quantizer(x[1:], torch.tensor([0])))
    both.sum().backward()
    assert quantizer.clip_lower_logit.grad is not None and (quantizer.clip_lower_logit.grad != 0).all()
    exported = quantizer.export()
    torch.testing.assert_close(exported[0], lower)
    torch.testing.assert_close(exported[1], upper)


def test_learning_the_clip_lowers_the_error() -> None:
    args = QuantArgs(num_bits=3, strategy="token")
    quantizer = ActivationQuantizer(args, torch.tensor([0.95]), torch.tensor([0.95]))
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    errors = []
    for _ in range(60):
        loss = (quantizer(x, torch.tensor([0])) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.8 * errors[0]
    assert quantizer.export()[0].item() < 0.85
