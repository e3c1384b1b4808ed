"""The judge is itself judged: on real clips of held-out digits, which it has never seen."""

from dataclasses import replace

import pytest
import torch

from qvgen.data.digits import ALL_ATTRIBUTES, COLOURS, DIGITS, DIRECTIONS, sample_clips
from qvgen.evaluation.quality.prompt_accuracy import judge, read_clips

MIN_DIGIT = 0.98


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.cat([sample_clips(list(ALL_ATTRIBUTES), generator, held_out=True) for _ in range(3)])


EXPECTED = list(ALL_ATTRIBUTES) * 3


def test_real_clips_are_read_right(held_out: torch.Tensor) -> None:
    verdict = judge(held_out, EXPECTED)
    assert verdict.colour == 1 and verdict.direction == 1
    assert verdict.digit >= MIN_DIGIT


def test_each_wrong_attribute_lowers_its_own_score_only(held_out: torch.Tensor) -> None:
    for name, size in (("colour", len(COLOURS)), ("direction", len(DIRECTIONS)), ("digit", len(DIGITS))):
        wrong = [replace(a, **{name: (getattr(a, name) + 1) % size}) for a in EXPECTED]
        scores = judge(held_out, wrong).as_dict()
        assert scores.pop(name) < 0.02
        assert min(scores.values()) >= MIN_DIGIT


def test_noise_mirrors_and_frozen_clips_do_not_pass(held_out: torch.Tensor) -> None:
    part, expected = held_out[:400], EXPECTED[:400]
    noise = judge(torch.rand(part.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1, expected)
    assert max(noise.as_dict().values()) < 0.35
    assert judge(part.flip(2), expected).direction == 0  # backwards in time
    assert judge(part[:, :, :1].expand_as(part), expected).direction < 0.2  # frozen
    assert judge(part[:, [1, 2, 0]], expected).colour < 0.3  # red to green, and so on; white stays


def test_light_noise_does_not_fool_it(held_out: torch.Tensor) -> None:
    noisy = held_out[:400] + 0.1 * torch.randn(400, *held_out.shape[1:], generator=torch.Generator().manual_seed(0))
    verdict = judge(noisy.clamp(-1, 1), EXPECTED[:400])
    assert verdict.colour == 1 and verdict.direction == 1 and verdict.digit >= 0.95


def test_bad_input_is_refused(held_out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(n, 3, t, h, w\)"):
        read_clips(held_out[0])
    with pytest.raises(ValueError, match="one caption per clip"):
        judge(held_out[:2], EXPECTED[:1])
    with pytest.raises(ValueError, match="at least one"):
        judge(held_out[:0], [])
