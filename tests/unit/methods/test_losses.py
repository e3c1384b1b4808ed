"""The objectives, against values worked out by hand."""

import math

import pytest
import torch

from qvgen.methods.dsa import ALPHA, teacher_share
from qvgen.methods.registry import METHODS

STUDENT = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
TEACHER = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
TARGET = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
CLEANNESS = torch.tensor([0.0, 1.0])


def loss(method: str, cleanness: torch.Tensor = CLEANNESS) -> float:
    return METHODS[method].loss(STUDENT, lambda: TEACHER, TARGET, cleanness).item()


@pytest.mark.parametrize("method", ["kd", "qdm", "efficientdm", "qvgen", "qvgen+"])
def test_towards_the_teacher(method: str) -> None:
    assert loss(method) == pytest.approx((1 + 0 + 0 + 16) / 4)


@pytest.mark.parametrize("method", ["lsq", "finetune"])
def test_towards_the_data_without_a_run_of_the_teacher(method: str) -> None:
    def teacher() -> torch.Tensor:
        raise AssertionError("the teacher ran for nothing")

    found = METHODS[method].loss(STUDENT, teacher, TARGET, CLEANNESS)
    assert found.item() == pytest.approx((0 + 4 + 9 + 0) / 4)


def test_dual_loss_follows_the_teacher_at_noise_and_the_data_at_the_end() -> None:
    # First sample, pure noise: teacher only, (1 + 0) / 2. Second, clean: target only, (9 + 0) / 2.
    assert loss("dsa") == pytest.approx((0.5 + 4.5) / 2)
    # Half way, α = 3: λ = (e^1.5 - 1) / (e^3 - 1) = 1 / (e^1.5 + 1).
    share = 1 / (math.exp(1.5) + 1)
    expected = ((share * 0.5 + (1 - share) * 2.0) + (share * 8.0 + (1 - share) * 4.5)) / 2
    assert loss("dsa", torch.tensor([0.5, 0.5])) == pytest.approx(expected, rel=1e-6)


def test_teacher_share_falls_from_one_to_zero() -> None:
    share = teacher_share(torch.linspace(0, 1, 11), ALPHA)
    assert share[0] == 1 and share[-1] == 0
    assert (share.diff() < 0).all()
    # α = 2, half way: (e - 1) / (e^2 - 1) = 1 / (e + 1).
    assert teacher_share(torch.tensor(0.5), 2.0).item() == pytest.approx(1 / (math.e + 1), rel=1e-6)
