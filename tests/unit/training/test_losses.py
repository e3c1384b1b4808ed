"""The objectives, against values worked out by hand."""

import math

import pytest
import torch

from qvgen.methods.registry import METHODS
from qvgen.training.loss import DSA_ALPHA, LOSSES, dual_loss, teacher_share

STUDENT = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
TEACHER = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
TARGET = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
CLEANNESS = torch.tensor([0.0, 1.0])


def test_teacher_and_target_loss() -> None:
    assert LOSSES["teacher"](STUDENT, TEACHER, TARGET, CLEANNESS).item() == pytest.approx((1 + 0 + 0 + 16) / 4)
    assert LOSSES["target"](STUDENT, TEACHER, TARGET, CLEANNESS).item() == pytest.approx((0 + 4 + 9 + 0) / 4)


def test_dual_loss_follows_the_teacher_at_noise_and_the_data_at_the_end() -> None:
    # First sample, pure noise: teacher only, (1 + 0) / 2. Second, clean: target only, (9 + 0) / 2.
    assert dual_loss(STUDENT, TEACHER, TARGET, CLEANNESS, alpha=3.0).item() == pytest.approx((0.5 + 4.5) / 2)
    # Half way, alpha = 2: λ = (e - 1) / (e^2 - 1) = 1 / (e + 1) = 0.268941.
    half = torch.tensor([0.5, 0.5])
    share = 1 / (math.e + 1)
    expected = ((share * 0.5 + (1 - share) * 2.0) + (share * 8.0 + (1 - share) * 4.5)) / 2
    assert dual_loss(STUDENT, TEACHER, TARGET, half, alpha=2.0).item() == pytest.approx(expected, rel=1e-6)


def test_teacher_share_falls_from_one_to_zero() -> None:
    share = teacher_share(torch.linspace(0, 1, 11), DSA_ALPHA)
    assert share[0] == 1 and share[-1] == 0
    assert (share.diff() < 0).all()
    assert share[5].item() == pytest.approx((math.exp(1.5) - 1) / (math.exp(3.0) - 1), rel=1e-6)


def test_every_method_has_its_loss_and_says_what_it_is() -> None:
    from importlib import import_module

    for name, method in METHODS.items():
        assert name == method.name
        assert method.loss in LOSSES
        module = import_module(f"qvgen.methods.{name.replace('+', '_plus')}")
        assert module.__doc__ and module.__doc__.splitlines()[0].strip()
